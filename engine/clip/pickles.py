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
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError

# Bounds far above what the largest CLIP needs (a pickled ViT-bigG: 1 MB, 60,000 operations).
_MAX_PICKLE_BYTES = 16 << 20
_MAX_OPERATIONS = 2_000_000
_MAX_OBJECTS = 200_000
_MAX_NESTING = 100
_MAX_DIRECTORY_BYTES = 32 << 20
_MAX_NAME = 200

ZIP_MARK = b"PK\x03\x04"
PICKLE_MARK = b"\x80"

_OPERATIONS = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "APPEND APPENDS SETITEM SETITEMS BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT BINPERSID GLOBAL REDUCE NEWOBJ BUILD".split()
)
_CONTAINERS = frozenset("APPEND APPENDS SETITEM SETITEMS BUILD".split())  # they fill what is already there
# What makes tensors, and containers: torch's own reader knows these.
_KNOWN = re.compile(
    r"collections\.OrderedDict|(builtins|__builtin__)\.set|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.\w*Storage|torch\.storage\.\w+Storage"
    r"|torch\.(float|bfloat|int|uint|half|double|long)\w*"
)
# Classes and functions that published models and training checkpoints name. Each is replaced by a stub.
_STUBBED = re.compile(
    r"(clip|gmpclip|orgclip|orgclipnosha|longclip|open_clip|model|__main__|transformers\.(models\.clip|activations)"
    r"|torch\.nn\.(modules|functional)|torch\._C\._nn|__torch__|torch\.jit\._pickle)(\.\w+)+"
    r"|numpy\.(dtype|core\.multiarray\.scalar|_core\.multiarray\.scalar)|_codecs\.encode"
    r"|argparse\.Namespace|pathlib\.(Posix|Windows)Path"
)
_NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights


class _Refused(Exception):
    """Why a file is not read, in words that go on from its name."""


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
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    return tensors, {"activation": _activation(named), "heads": heads}


# ---- the pickle as a text --------------------------------------------------------------------------------------------


def _check(stream: io.BytesIO) -> tuple[set[str], int]:
    """Read one pickle's operations without performing them; the names that it asks for, and the sum of its numbers."""
    operations = objects = numbers = 0
    named: set[str] = set()
    nesting = _Nesting()
    try:
        for operation, argument, _ in pickletools.genops(stream):
            operations += 1
            if operation.name not in _OPERATIONS:
                raise _Refused(
                    f"holds a pickle that torch did not write (operation {operation.name}); nothing in it was run. "
                    "Use a .safetensors file of this model."
                )
            objects += operation.name in ("REDUCE", "NEWOBJ", "BINPERSID")
            numbers += argument if operation.name.startswith(("BININT", "LONG1")) and argument > 0 else 0
            if (
                operations > _MAX_OPERATIONS
                or objects > _MAX_OBJECTS
                or nesting.after(operation, argument) > _MAX_NESTING
            ):
                raise _Refused(
                    "holds a pickle that no model needs (too much in it, or nested too deep); it was not read."
                )
            if operation.name == "GLOBAL":
                named.add(_allowed(argument.replace(" ", ".", 1)))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise _Refused("is damaged or cut off; download or save it again, or use a .safetensors file.") from error
    return named, numbers


def _allowed(name: str) -> str:
    if not (_KNOWN.fullmatch(name) or _STUBBED.fullmatch(name)):
        raise _Refused(
            f"asks for {name[:200]!r}, which is not a weight, and nothing else in it is ever run; use a .safetensors "
            "file of this model."
        )
    return name


class _Nesting:
    """How deep the objects on a pickle's stack are nested: Python's own hash of a deep tuple ends the process."""

    def __init__(self):
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}

    def after(self, operation: pickletools.OpcodeInfo, argument: Any) -> int:
        """The depth of what is on top after this operation."""
        name = operation.name
        if name == "MARK":
            self.marks.append(len(self.stack))
            return 0
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            taken = self._take(operation)
            inner = max(taken, default=0)
            if name in _CONTAINERS:
                self.stack.append(max(taken[0], 1 + max(taken[1:], default=0)))
            elif operation.stack_after:
                self.stack.append(1 + inner)
        return self.stack[-1] if self.stack else 0

    def _take(self, operation: pickletools.OpcodeInfo) -> list[int]:
        wanted = [
            item for item in operation.stack_before if item not in (pickletools.markobject, pickletools.stackslice)
        ]
        start = len(self.stack)
        if pickletools.markobject in operation.stack_before:
            start = self.marks.pop()
        start -= len(wanted)
        if start < 0:
            raise ValueError("a pickle takes more than it has put down")
        taken, self.stack[start:] = self.stack[start:], []
        return taken


# ---- state dicts and whole models, by torch's weights_only reader ----------------------------------------------------


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, set[str]]:
    entries = _entries(file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused("is a zip file, but not one of torch's; unpack it, and use the model in it.")
    root = pickles[0].removesuffix("data.pkl")
    script = any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in entries)
    size = path.stat().st_size
    for name, info in entries.items():
        # A script's code is packed; it is not read.
        if not script or name == pickles[0] or name.startswith(f"{root}data/"):
            _check_entry(info, size)
    named, _ = _check(io.BytesIO(_content(file, entries[pickles[0]])))
    if script:
        return _read_script(path, file, entries, root), named
    return _load(path, named, mmap=True), named


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, set[str]]:
    """torch's format before 1.6: five pickles (a mark, two of versions, objects, the names of storages), then data."""
    file.seek(0)
    stream, named, size = io.BytesIO(file.read(_MAX_PICKLE_BYTES)), set(), path.stat().st_size
    for index in range(5):
        more, numbers = _check(stream)
        named |= more
        # The numbers of the fourth are elements to make room for, and shapes.
        if index == 3 and numbers > 2 * size + 10_000_000:
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
        raise _Refused("is a zip file that holds two files of one name; it was not read.")
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
        raise _Refused("is a zip file of too many files to be a model; it was not read.")


def _content(file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _MAX_PICKLE_BYTES:
        raise _Refused("holds a pickle that no model needs (too large); it was not read.")
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
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


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
        data = self.whole[start : start + size]
        return dtype, data if start % dtype.itemsize == 0 else data.clone()


def _rebuild(storage: tuple[torch.dtype, torch.UntypedStorage], offset, size, stride, *_) -> Tensor:
    return torch.empty(0, dtype=storage[0]).set_(storage[1], offset, size, stride)


# ---- from objects to names -------------------------------------------------------------------------------------------


def _named_tensors(loaded: Any) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Tensors by their names in a state dict, and (vision, text) heads where a pickled model tells them."""
    for _ in _NESTED:
        if isinstance(loaded, Mapping):
            inner = (loaded.get(name) for name in _NESTED)
            loaded = next((value for value in inner if isinstance(value, (_Stub, Mapping))), loaded)
    if isinstance(loaded, Mapping):
        tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
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
    left[0] -= 1
    if left[0] < 0 or depth > _MAX_NESTING:
        raise _Refused("holds a model without end; it was not read.")
    yield prefix, module
    kept = module.__dict__.get("_modules")
    for name, child in (kept if isinstance(kept, Mapping) else module.__dict__).items():
        if isinstance(child, _Stub) and isinstance(name, str):
            if len(name) > _MAX_NAME:
                raise _Refused("holds a model with endless names; it was not read.")
            yield from _modules(child, f"{prefix}{name}.", left, depth + 1)


def _own_tensors(module: _Stub) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module; of a scripted one, all that is a tensor."""
    kept = module.__dict__
    if isinstance(kept.get("_parameters"), Mapping):
        fleeting = kept.get("_non_persistent_buffers_set")
        fleeting = fleeting if isinstance(fleeting, set) else set()
        buffers = kept.get("_buffers")
        buffers = buffers if isinstance(buffers, Mapping) else {}
        kept = {**kept["_parameters"], **{name: value for name, value in buffers.items() if name not in fleeting}}
    return {name: value for name, value in kept.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _check_storages(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that repeats its data: made whole, a few bytes of it could fill any memory."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise _Refused(f"claims more values for {name} than it holds; download or save it again.")


def _activation(named: set[str]) -> str | None:
    """From the classes that a pickled or scripted model is made of."""
    classes = {name.rpartition(".")[2] for name in named}
    if classes & {"QuickGELU", "QuickGELUActivation"}:
        return "quick_gelu"
    return "gelu" if classes & {"GELU", "GELUActivation"} else None
