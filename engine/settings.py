"""Settings: frozen dataclasses whose fields carry a help text, a range and, as a `Literal` type, their choices.

One description of a setting feeds the command line, the nodes, the run folder and the docs:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LossConfig(Settings):
        label_smoothing: float = setting(0.0, "Share of the target spread over all captions.", min=0.0, max=0.99)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from .errors import UserError

_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Choice(Protocol):
    """A record in a registry that a setting chooses from."""

    @property
    def help(self) -> str: ...


def setting(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    step: float | None = None,
    choices: Mapping[str, Choice] | None = None,
    bookkeeping: bool = False,
) -> Any:
    """Return a dataclass field.

    `choices`: a registry whose records a `str` names; their help texts are added to `help`. A fixed set of words is a
    `Literal` type instead. `bookkeeping`: changing the value does not change the result of a run.
    """
    if choices:
        help += " " + "; ".join(f"{name}: {choice.help}" for name, choice in choices.items()) + "."
    metadata = dict(help=help, min=min, max=max, step=step, choices=tuple(choices or ()), bookkeeping=bookkeeping)
    return dataclasses.field(default=default, metadata=types.MappingProxyType(metadata))


@dataclasses.dataclass(frozen=True)
class SettingInfo:
    """What a front end needs to know about one setting; `kind` is int, float, str or bool; only a str has `choices`."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    step: float | None = None
    bookkeeping: bool = False
    section: str = ""

    def check(self, value: Any) -> Any:
        """Return the value, an int as a float where a float is wanted. Raises `UserError` for any other."""
        if self.kind is float and type(value) is int:
            value = float(value)
        given_kind = type(value)
        if given_kind is not self.kind:
            raise UserError(f"{self.name} is {value!r}; it must be {_KIND_NAMES[self.kind]}.")
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} is {value!r}; choose {' or '.join(self.choices)}.")
        if self.kind is float and not math.isfinite(value):
            raise UserError(f"{self.name} is {value}; it must be a finite number.")
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise UserError(f"{self.name} is {value}; it must be between {self.min} and {self.max}.")
        return value


class Settings:
    """Base of settings dataclasses: checks every value when one is made."""

    def __post_init__(self) -> None:
        for name, info in setting_infos(type(self)).items():
            object.__setattr__(self, name, info.check(getattr(self, name)))


def setting_infos(cls: type) -> Mapping[str, SettingInfo]:
    """Return the settings of a dataclass by name, in order. Fields that were not made by `setting` are left out."""
    return _setting_infos(cls)


@functools.cache
def _setting_infos(cls: type) -> Mapping[str, SettingInfo]:
    hints = get_type_hints(cls)
    infos = {}
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            metadata, kind = dict(field.metadata), hints[field.name]
            if get_origin(kind) is Literal:
                metadata["choices"], kind = get_args(kind), str
            infos[field.name] = SettingInfo(field.name, kind, field.default, **metadata)
    return types.MappingProxyType(infos)
