"""Weights out of torch's files (`.pt`, `.bin`, `.ckpt`, TorchScript archives), of which nothing is ever run.

A pickle is a program. Here it is first read as a text: each of its operations and each name that it asks for must be on
a list. Then torch's own `weights_only` reader makes the tensors, and every class of a pickled model becomes an inert
stub that holds attributes and nothing else. TorchScript archives are read by an unpickler that knows tensors and stubs;
the code in them is not even looked at.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, one_line, shown

# Bounds far above what the largest CLIP needs (a pickled ViT-bigG: 1 MB, 120,000 operations).
_MAX_PICKLE_BYTES = 16 << 20
_MAX_OPERATIONS = 500_000
_MAX_OBJECTS = 100_000
_MAX_WORK = 5_000_000
_MAX_NESTING = 100
_MAX_DIRECTORY_BYTES = 4 << 20
_MAX_NAME = 200
_MAX_SHARING = 8  # tied weights are stored once and counted twice
_ENDLESS = 1 << 62  # what is reckoned to be more is as good as this

ZIP_MARK = b"PK\x03\x04"
PICKLE_MARK = b"\x80"

_OPERATIONS = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "APPEND APPENDS SETITEM SETITEMS BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT BINPERSID GLOBAL REDUCE NEWOBJ BUILD".split()
)
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
# How many values an operation takes, and whether it takes all down to a mark besides.
_TAKEN = {
    operation.name: (
        sum(item not in (pickletools.markobject, pickletools.stackslice) for item in operation.stack_before),
        pickletools.markobject in operation.stack_before,
    )
    for operation in pickletools.opcodes
}
_CONTAINERS = frozenset("APPEND APPENDS SETITEM SETITEMS BUILD".split())  # they fill what is already there
# What makes tensors, and containers: torch's own reader knows these.
_KNOWN = re.compile(
    r"collections\.OrderedDict|(builtins|__builtin__)\.set|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|torch\.\w*Storage"
    r"|torch\.(float|bfloat|int|uint|half|double|long)\w*"
)
# Classes and functions that published models and training checkpoints name. Each is replaced by a stub.
_STUBBED = re.compile(
    r"(clip|clip_finetune|gmpclip|orgclip|orgclipnosha|longclip|open_clip|model|__main__|pytorch_lightning|lightning"
    r"|transformers\.(models\.clip|activations)|torch\.nn\.(modules|functional)|torch\._C\._nn|__torch__|torch\.jit\._pickle)(\.\w+)+"
    r"|numpy\.(dtype|core\.multiarray\.scalar|_core\.multiarray\.scalar)|_codecs\.encode"
    r"|argparse\.Namespace|pathlib\.(Posix|Windows)Path"
)
_NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights


_NO_MODEL = (
    "holds a pickle that no model needs (too much in it, or nested too deep), which was not read; use a .safetensors "
    "file of this model."
)


class _Refused(Exception):
    """Why a file is not read, in words that go on from its name."""


class _Told(NamedTuple):
    """Of a pickle: the names that it asks for, the sum of its numbers and of the products of its tuples, and how many
    operations it has."""

    names: set[str]
    numbers: int
    operations: int


class _Stub:
    """Stands for an object of a class that is not to be made; it keeps attributes and does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


def read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors (CPU) of a file that torch wrote, and what the classes in it tell: activation and heads.

    Zip files are memory-mapped. Known are state dicts, training checkpoints with one, whole pickled models and
    TorchScript archives. Raises `UserError` with the file and the way out.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == ZIP_MARK:
                loaded, named = _read_zip(path, file)
            else:
                loaded, named = _read_legacy(path, file)
        tensors, heads = _named_tensors(loaded)
        _check_storages(tensors)
    except _Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); choose another file.") from error
    told = {"activation": _activation(named)} | dict(zip(("vision_heads", "text_heads"), heads or (), strict=False))
    return tensors, {name: value for name, value in told.items() if value is not None}


# ---- the pickle as a text --------------------------------------------------------------------------------------------


def _check(stream: io.BytesIO, most: int = _MAX_OPERATIONS) -> _Told:
    """Read one pickle's operations without performing them; refuses what is not to be performed."""
    done = objects = 0
    named: set[str] = set()
    stack = _Stack()
    try:
        for operation, argument, _ in pickletools.genops(stream):
            done += 1
            if operation.name not in _OPERATIONS:
                raise _Refused(
                    f"holds a pickle that torch did not write (operation {operation.name}); nothing in it was run. "
                    "Use a .safetensors file of this model."
                )
            objects += operation.name in ("REDUCE", "NEWOBJ", "BINPERSID")
            if operation.name in _PUT and argument > done:  # a reader may make room for as many
                raise _Refused(_NO_MODEL)
            if done > most or objects > _MAX_OBJECTS or stack.after(operation, argument) > _MAX_NESTING:
                raise _Refused(_NO_MODEL)
            if operation.name == "GLOBAL":
                named.add(_allowed(argument.replace(" ", ".", 1)))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise _Refused("is damaged or cut off; download or save it again, or use a .safetensors file.") from error
    return _Told(named, stack.numbers, done)


def _allowed(name: str) -> str:
    if not (_KNOWN.fullmatch(name) or _STUBBED.fullmatch(name)):
        raise _Refused(
            f"asks for '{one_line(name)}', which is not a weight, and nothing else in it is ever run; use a "
            ".safetensors file of this model."
        )
    return name


class _Value:
    """Of something on a pickle's stack: how deep it is nested, how large it is if all that it holds is counted anew
    wherever it is held, and the number that it is, or the product of those in a tuple."""

    __slots__ = ("depth", "size", "number")

    def __init__(self, depth: int, size: int, number: int | None = None):
        self.depth, self.size, self.number = depth, min(size, _ENDLESS), number


class _Stack:
    """What a pickle's operations put down and take up, reckoned without making it.

    Python's own hash of a deep tuple ends the process, that of one which holds the same tuples over and over never
    ends, and what is called with, or gets the state of, the same large list again and again fills the memory.
    """

    def __init__(self):
        self.values: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.work = self.numbers = 0

    def after(self, operation: pickletools.OpcodeInfo, argument: Any) -> int:
        """The depth of what is on top after this operation; refuses what is too much to make."""
        name = operation.name
        if name == "MARK":
            self.marks.append(len(self.values))
            return 0
        if name in _PUT:
            self.memo[argument] = self.values[-1]
        elif name in _GET:
            self._push(self.memo[argument])
        else:
            self._perform(operation, argument)
        return self.values[-1].depth if self.values else 0

    def _perform(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        name = operation.name
        taken = self._take(name) if operation.stack_before else []
        size, depth = sum(value.size for value in taken), max((value.depth for value in taken), default=0)
        if name in ("REDUCE", "BUILD"):
            self.work += size
        if name in ("SETITEM", "SETITEMS") and any(key.depth > 1 for key in taken[1::2]) or self.work > _MAX_WORK:
            raise _Refused(_NO_MODEL)
        if name in _CONTAINERS:
            held = max((value.depth for value in taken[1:]), default=0)
            taken[0].depth, taken[0].size = max(taken[0].depth, 1 + held), min(size, _ENDLESS)
            self.values.append(taken[0])
        elif operation.stack_after:
            self._push(_Value(1 + depth, 1 + size, _number(name, argument, taken)))

    def _push(self, value: _Value) -> None:
        self.values.append(value)
        self.numbers += value.number or 0

    def _take(self, name: str) -> list[_Value]:
        count, to_mark = _TAKEN[name]
        start = (self.marks.pop() if to_mark else len(self.values)) - count
        if start < 0:
            raise ValueError("a pickle takes more than it has put down")
        taken, self.values[start:] = self.values[start:], []
        return taken


def _number(name: str, argument: Any, taken: list[_Value]) -> int | None:
    """The number that an operation puts down, none below 0; of a tuple, the product of its numbers."""
    if name in _NUMBERS:
        return min(max(argument, 0), _ENDLESS)
    if "TUPLE" not in name:
        return None
    product = 1
    for value in taken:
        product = min(product * (1 if value.number is None else value.number), _ENDLESS)
    return product


# ---- state dicts and whole models, by torch's weights_only reader ----------------------------------------------------


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, set[str]]:
    entries = _entries(file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused("is a zip file, but not one of torch's; unpack it, and use the model in it.")
    root = pickles[0].removesuffix("data.pkl")
    script = any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in entries)
    size = path.stat().st_size
    # A script's code is packed; it is not read.
    read = [e for name, e in entries.items() if not script or name == pickles[0] or name.startswith(f"{root}data/")]
    for info in read:
        _check_entry(info, size)
    if sum(info.file_size for info in read) > size:
        raise _Refused("is a zip file in which several files are in one place; download or save it again.")
    named = _check(io.BytesIO(_content(file, entries[pickles[0]]))).names
    if script:
        return _read_script(path, file, entries, root), named
    return _load(path, named, mmap=True), named


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, set[str]]:
    """torch's format before 1.6: five pickles (a mark, two of versions, objects, the names of storages), then data."""
    file.seek(0)
    stream, named, size = io.BytesIO(file.read(_MAX_PICKLE_BYTES)), set(), path.stat().st_size
    left = _MAX_OPERATIONS
    for index in range(5):
        told = _check(stream, left)
        named |= told.names
        left -= told.operations
        # The fourth has the number of a storage's elements, for which room is made, twice, and its tensor's shape.
        if index == 3 and told.numbers > 4 * size + 10_000_000:
            raise _Refused("claims more weights than it holds; download or save it again.")
    if any(name.startswith("torch.nn.modules.") for name in named):
        raise _Refused(
            "is a whole model in the format that torch wrote before version 1.6, which brings its own code; nothing in "
            "it was run. Open it where it was made, and save its state_dict."
        )
    return _load(path, named, mmap=False), named


def _load(path: Path, named: set[str], mmap: bool) -> Any:
    stubs = [_stub(name) for name in sorted(named) if _STUBBED.fullmatch(name)]
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file makes torch raise whatever its readers stumble over
        raise _Refused("is damaged or cut off; download or save it again, or use a .safetensors file.") from error


def _stub(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (_Stub,), {"__module__": module})


# ---- zip files -------------------------------------------------------------------------------------------------------


def _entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip, by their names."""
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError) as error:
        raise _Refused("is damaged or cut off; download or save it again, or use a .safetensors file.") from error
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise _Refused("is a zip file that holds two files of one name; download or save it again.")
    return entries


def _check_entry(info: zipfile.ZipInfo, size: int) -> None:
    """Refuse what is packed or cut off: torch packs no weights, and what is packed may become of any size."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise _Refused("is a packed zip file, as torch never writes one; unpack it, and use the model in it.")
    if info.header_offset + info.file_size > size:
        raise _Refused("is damaged or cut off; download or save it again.")


def _check_directory(file: BinaryIO) -> None:
    """Refuse a directory of files so long that reading it alone would fill the memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 66_000))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    long = struct.unpack_from("<I", tail, end + 12)[0] if 0 <= end <= len(tail) - 22 else 0
    if end64 >= 0 and len(tail) - end64 >= 56:
        long = max(long if long != 0xFFFFFFFF else 0, struct.unpack_from("<Q", tail, end64 + 40)[0])
    if long > _MAX_DIRECTORY_BYTES:
        raise _Refused("is a zip file of too many files to be a model; choose another file.")


def _content(file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _MAX_PICKLE_BYTES:
        raise _Refused(_NO_MODEL)
    file.seek(_start(file, info))
    return file.read(info.file_size)


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin in the file."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != ZIP_MARK:
        raise _Refused("is damaged; download or save it again.")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return info.header_offset + 30 + name_length + extra_length


# ---- TorchScript archives --------------------------------------------------------------------------------------------

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _read_script(path: Path, file: BinaryIO, entries: Mapping[str, zipfile.ZipInfo], root: str) -> Any:
    whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    places = {
        name.removeprefix(f"{root}data/"): (_start(file, info), info.file_size)
        for name, info in entries.items()
        if name.startswith(f"{root}data/")
    }
    content = _content(file, entries[f"{root}data.pkl"])
    try:
        return _ScriptUnpickler(io.BytesIO(content), whole, places).load()
    except _Refused:
        raise
    except Exception as error:  # whatever a damaged pickle makes Python's reader stumble over
        raise _Refused("is damaged or cut off; download or save it again, or use a .safetensors file.") from error


class _ScriptUnpickler(pickle.Unpickler):
    """Makes tensors over the mapped file, plain containers, and stubs; it can make nothing else."""

    def __init__(self, stream: io.BytesIO, whole: torch.UntypedStorage, places: Mapping[str, tuple[int, int]]):
        super().__init__(stream)
        self.whole, self.places = whole, places
        self.copies: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        # Made anew each time: a pickle can set attributes of what it is given.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *parts: _rebuild(*parts)
        if module == "torch.jit._pickle":  # lists and dicts with their types
            return lambda value, *_: value
        return _stub(_allowed(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, torch.UntypedStorage]:
        _, dtype, key, _, elements = pid
        start, size = self.places[key]
        if not isinstance(dtype, torch.dtype) or elements * dtype.itemsize > size:
            raise ValueError(f"the data of storage {key} is not all there")
        if start % dtype.itemsize == 0:
            return dtype, self.whole[start : start + size]
        if key not in self.copies:
            self.copies[key] = self.whole[start : start + size].clone()
        return dtype, self.copies[key]


def _rebuild(storage: tuple[torch.dtype, torch.UntypedStorage], offset, size, stride, *_) -> Tensor:
    return torch.empty(0, dtype=storage[0]).set_(storage[1], offset, size, stride)


# ---- from objects to names -------------------------------------------------------------------------------------------


def _named_tensors(loaded: Any) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Tensors by their names in a state dict, and (vision, text) heads where a pickled model tells them."""
    for _ in _NESTED:
        if isinstance(loaded, dict):
            inner = (dict.get(loaded, name) for name in _NESTED)  # a pickle can give it a `get` and `items` of its own
            loaded = next((value for value in inner if isinstance(value, (_Stub, dict))), loaded)
    if isinstance(loaded, dict):
        items = dict.items(loaded)
        tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
        return {name: tensor.detach() for name, tensor in tensors.items()}, None
    if not isinstance(loaded, _Stub):
        raise _Refused("does not hold named weights; use a .safetensors file of this model.")
    modules = dict(_modules(loaded, "", [_MAX_OBJECTS], 0))
    tensors = {}
    for prefix, module in modules.items():
        for name, value in _own_tensors(module).items():
            tensors[f"{prefix}{name}"] = value.detach()
    heads = [
        getattr(modules.get(f"{tower}transformer.resblocks.0.attn."), "num_heads", None) for tower in ("visual.", "")
    ]
    return tensors, (heads[0], heads[1]) if all(type(count) is int for count in heads) else None


def _modules(module: _Stub, prefix: str, left: list[int], depth: int) -> Iterator[tuple[str, _Stub]]:
    kept = module.__dict__.get("_modules")
    kept = kept if isinstance(kept, dict) else module.__dict__
    left[0] -= 1 + len(kept) + sum(len(value) for value in module.__dict__.values() if isinstance(value, dict))
    if left[0] < 0 or depth > _MAX_NESTING or len(prefix) > _MAX_NAME:
        raise _Refused("holds a model without end, which was not read; use a .safetensors file of this model.")
    yield prefix, module
    for name, child in dict.items(kept):
        if isinstance(child, _Stub) and isinstance(name, str):
            yield from _modules(child, f"{prefix}{name}.", left, depth + 1)


def _own_tensors(module: _Stub) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module; of a scripted one, all that is a tensor."""
    kept = module.__dict__
    if isinstance(kept.get("_parameters"), dict):
        fleeting = kept.get("_non_persistent_buffers_set")
        fleeting = fleeting if isinstance(fleeting, set) else set()
        buffers = kept.get("_buffers")
        buffers = dict.items(buffers) if isinstance(buffers, dict) else ()
        kept = dict(dict.items(kept["_parameters"])) | {n: value for n, value in buffers if n not in fleeting}
    return {name: value for name, value in kept.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor has a place of its own in its data for each of its values; torch does not insist on it."""
    if tensor.layout != torch.strided or any(size < 0 for size in tensor.shape):
        return False
    last = tensor.storage_offset() + sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    places = max(last + 1, tensor.numel()) if tensor.numel() else 0
    return places * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_storages(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that repeats its data: made whole, a few bytes of it could fill any memory."""
    for name, tensor in tensors.items():
        if not _whole(tensor):
            raise _Refused(f"claims more values for {shown(name)} than it holds; download or save it again.")
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_SHARING * sum(held.values()):
        raise _Refused("claims the same values under very many names; download or save it again.")


def _activation(named: set[str]) -> str | None:
    """From the classes that a pickled or scripted model is made of."""
    classes = {name.rpartition(".")[2] for name in named}
    if classes & {"QuickGELU", "QuickGELUActivation"}:
        return "quick_gelu"
    return "gelu" if classes & {"GELU", "GELUActivation"} else None
