"""FullCLIP: the immutable value that goes from node to node, and its description in a file's metadata."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .architecture import (
    ASSUMED_ACTIVATION,
    Activation,
    Architecture,
    Parameterization,
    check_shapes,
    is_assumption,
    parameterization_of,
)

METADATA_KEY = "clip_finetune"


@dataclasses.dataclass(frozen=True, eq=False)
class FullCLIP:
    """Both towers, both projections and `logit_scale`, as an immutable value.

    `state_dict` holds CPU tensors under OpenAI's names, in the dtypes in which they were stored; nobody writes into
    them. `provenance` is plain JSON. `notes` are sentences for the user on what was assumed or done.
    """

    architecture: Architecture
    state_dict: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_dict", MappingProxyType(dict(self.state_dict)))
        check_shapes({name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}, self.architecture)

    @functools.cached_property
    def parameterization(self) -> Parameterization:
        return parameterization_of(self.state_dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors by their torch names, the one with the most elements first."""
        elements: dict[torch.dtype, int] = {}
        for tensor in self.state_dict.values():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
        ordered = sorted(elements, key=elements.__getitem__, reverse=True)
        return tuple(str(dtype).removeprefix("torch.") for dtype in ordered)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every tensor's name, dtype and bits."""
        return fingerprint_of(self.architecture, self.state_dict)

    def derive(
        self,
        changed: Mapping[str, Tensor],
        *,
        step: str,
        dropped: Iterable[str] = (),
        notes: Iterable[str] = (),
        architecture: Architecture | None = None,
    ) -> FullCLIP:
        """Return a new value with these tensors changed or added; it shares the others with this one.

        `step` says in a few words what was done; it is appended to the provenance's history.
        """
        dropped = set(dropped)
        tensors = {name: tensor for name, tensor in self.state_dict.items() if name not in dropped}
        history = [*self.provenance.get("history", ()), step]
        return FullCLIP(
            architecture=architecture or self.architecture,
            state_dict=tensors | dict(changed),
            provenance={**self.provenance, "history": history},
            notes=tuple(dict.fromkeys((*self.notes, *notes))),
        )


def fingerprint_of(architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of an architecture and of some tensors' names, dtypes and bits."""
    digest = hashlib.sha256(json.dumps(architecture.as_dict(), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_metadata(full_clip: FullCLIP) -> dict[str, str]:
    """Return the metadata of a full CLIP's file (see "Files" in the README)."""
    description = {
        "architecture": full_clip.architecture.as_dict(),
        "activation": full_clip.architecture.activation,
        "parameterization": full_clip.parameterization,
        "provenance": dict(full_clip.provenance),
        # Notes on what was done are history by now; what was assumed stays true of the file.
        "notes": [note for note in full_clip.notes if is_assumption(note)],
    }
    return {"format": "pt", METADATA_KEY: json.dumps(description)}


def read_metadata(
    metadata: Mapping[str, str], activation: Activation | None = None
) -> tuple[Architecture, dict[str, Any], tuple[str, ...]] | None:
    """Return architecture, provenance and notes as `file_metadata` wrote them; None for another program's file.

    `activation` replaces the one in the file. Raises `UserError` for damaged metadata.
    """
    if METADATA_KEY not in metadata:
        return None
    try:
        description = json.loads(metadata[METADATA_KEY])
        sizes = {**description["architecture"], "activation": activation or description.get("activation")}
        provenance, notes = description.get("provenance", {}), description.get("notes", [])
        if not isinstance(provenance, dict) or not isinstance(provenance.get("history", []), list):
            raise TypeError("provenance")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise TypeError("notes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"it has damaged metadata under {METADATA_KEY}; save the model again or use another file."
        ) from error
    valid = (note for note in notes if not (activation and note == ASSUMED_ACTIVATION))
    return Architecture.from_dict(sizes), provenance, tuple(valid)
