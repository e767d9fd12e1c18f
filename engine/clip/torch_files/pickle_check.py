"""Check a pickle without running it: only operations and names on a list, and no more work than a CLIP needs."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import one_line

# Bounds far above what the largest CLIP needs (a pickled ViT-bigG has 1 MB and 120,000 operations).
MAX_PICKLE_BYTES = 16 << 20
MAX_OPERATIONS = 500_000
MAX_OBJECTS = 100_000
MAX_NESTING = 100
_MAX_WORK = 5_000_000
_INFINITE = 1 << 62  # sizes and numbers are clamped to this, so that they stay small integers

_OPERATIONS = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "APPEND APPENDS SETITEM SETITEMS BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT BINPERSID GLOBAL REDUCE NEWOBJ BUILD".split()
)
_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_FILLING = frozenset("APPEND APPENDS SETITEM SETITEMS BUILD".split())  # change a container that is already there
# For each operation: how many values it pops, and whether it also pops everything down to a mark.
_POPPED = {
    operation.name: (
        sum(item not in (pickletools.markobject, pickletools.stackslice) for item in operation.stack_before),
        pickletools.markobject in operation.stack_before,
    )
    for operation in pickletools.opcodes
}
# Names that torch's weights_only reader knows: what makes tensors, and containers.
_KNOWN = re.compile(
    r"collections\.OrderedDict|(builtins|__builtin__)\.set|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|torch\.\w*Storage"
    r"|torch\.(float|bfloat|int|uint|half|double|long)\w*"
)
# Classes and functions that published models and training checkpoints name. Each is replaced by a stub.
_STUBBED = re.compile(
    r"(clip|clip_finetune|gmpclip|orgclip|orgclipnosha|longclip|open_clip|model|__main__|pytorch_lightning|lightning"
    r"|transformers\.(models\.clip|activations)|torch\.nn\.(modules|functional)|torch\._C\._nn|__torch__"
    r"|torch\.jit\._pickle)(\.\w+)+"
    r"|numpy\.(dtype|core\.multiarray\.scalar|_core\.multiarray\.scalar)|_codecs\.encode"
    r"|argparse\.Namespace|pathlib\.(Posix|Windows)Path"
)

DAMAGED = "is damaged or cut off; download or save it again, or use a .safetensors file."
TOO_MUCH = (
    "holds a pickle that no model needs (too much in it, or nested too deep), which was not read; use a .safetensors "
    "file of this model."
)


class Refused(Exception):
    """A file is not read; the text is the reason, as the end of a sentence that begins with the file's name."""


class PickleSummary(NamedTuple):
    """The names that a pickle asks for, the sum of its integers and of the products of its tuples, and the number of
    its operations."""

    names: set[str]
    numbers: int
    operations: int


def check_pickle(stream: io.BytesIO, max_operations: int = MAX_OPERATIONS) -> PickleSummary:
    """Read one pickle's operations without performing them; raise `Refused` for one that must not be loaded."""
    done = objects = 0
    names: set[str] = set()
    stack = _Stack()
    try:
        for operation, argument in _operations(stream):
            done += 1
            if operation.name not in _OPERATIONS:
                raise Refused(
                    f"holds a pickle that torch did not write (operation {operation.name}); nothing in it was run. "
                    "Use a .safetensors file of this model."
                )
            objects += operation.name in ("REDUCE", "NEWOBJ", "BINPERSID")
            if operation.name in _PUT and argument > done:  # an unpickler may allocate a memo of this length
                raise Refused(TOO_MUCH)
            if done > max_operations or objects > MAX_OBJECTS or stack.perform(operation, argument) > MAX_NESTING:
                raise Refused(TOO_MUCH)
            if operation.name == "GLOBAL":
                names.add(allowed_name(argument.replace(" ", ".", 1)))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise Refused(DAMAGED) from error
    return PickleSummary(names, stack.numbers, done)


def _operations(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for operation, argument, _ in pickletools.genops(stream):
        yield operation, argument


def allowed_name(name: str) -> str:
    """Return the full name of a class or function; raise `Refused` if it is on no list."""
    if not (_KNOWN.fullmatch(name) or is_stubbed(name)):
        raise Refused(
            f"asks for '{one_line(name)}', which is not a weight, and nothing else in it is ever run; use a "
            ".safetensors file of this model."
        )
    return name


def is_stubbed(name: str) -> bool:
    """Return whether a stub replaces the class or function of this name."""
    return _STUBBED.fullmatch(name) is not None


class _Value:
    """A value on a pickle's stack, reduced to what could be dangerous about it.

    `depth` is how deep it is nested. `size` counts everything in it, shared parts as often as they are referred to.
    `number` is its value if it is an integer, and the product of its integers if it is a tuple.
    """

    __slots__ = ("depth", "size", "number")

    def __init__(self, depth: int, size: int, number: int | None = None) -> None:
        self.depth, self.size, self.number = depth, min(size, _INFINITE), number


class _Stack:
    """The stack and the memo of an unpickler, with `_Value`s in place of objects.

    Small pickles can be bombs. Hashing a deep tuple overflows the C stack and ends the process; hashing a tuple that
    holds the same tuples over and over never ends; calling a class with the same large list, or setting that as its
    state, again and again fills the memory. All of it shows in depths and sizes.
    """

    def __init__(self) -> None:
        self.values: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.work = self.numbers = 0

    def perform(self, operation: pickletools.OpcodeInfo, argument: Any) -> int:
        """Perform one operation and return the depth of the value on top; raise `Refused` for too much work."""
        name = operation.name
        if name == "MARK":
            self.marks.append(len(self.values))
            return 0
        if name in _PUT:
            self.memo[argument] = self.values[-1]
        elif name in _GET:
            self._push(self.memo[argument])
        else:
            self._pop_and_push(operation, argument)
        return self.values[-1].depth if self.values else 0

    def _pop_and_push(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        name = operation.name
        popped = self._pop(name) if operation.stack_before else []
        size, depth = sum(value.size for value in popped), max((value.depth for value in popped), default=0)
        if name in ("REDUCE", "BUILD"):  # the call, or the update, goes over all of its arguments
            self.work += size
        nested_key = name in ("SETITEM", "SETITEMS") and any(key.depth > 1 for key in popped[1::2])
        if nested_key or self.work > _MAX_WORK:
            raise Refused(TOO_MUCH)
        if name in _FILLING:
            # The container stays the same object: what holds it already becomes deeper and larger with it.
            container, *items = popped
            container.depth = max(container.depth, 1 + max((value.depth for value in items), default=0))
            container.size = min(size, _INFINITE)
            self.values.append(container)
        elif operation.stack_after:
            self._push(_Value(1 + depth, 1 + size, _number(name, argument, popped)))

    def _push(self, value: _Value) -> None:
        self.values.append(value)
        self.numbers += value.number or 0

    def _pop(self, name: str) -> list[_Value]:
        count, to_mark = _POPPED[name]
        start = (self.marks.pop() if to_mark else len(self.values)) - count
        if start < 0:
            raise ValueError("a pickle pops more than it has pushed")
        popped, self.values[start:] = self.values[start:], []
        return popped


def _number(name: str, argument: Any, popped: list[_Value]) -> int | None:
    """Return `_Value.number` of what an operation pushes; negative integers count as 0."""
    if name in _INTEGERS:
        return min(max(argument, 0), _INFINITE)
    if "TUPLE" not in name:
        return None
    product = 1
    for value in popped:
        product = min(product * (1 if value.number is None else value.number), _INFINITE)
    return product
