"""Read the tensors of a TorchScript archive, as OpenAI published its models, without torch.jit and without its code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .objects import make_stub
from .pickle_check import DAMAGED, Refused, allowed_name
from .zip_entries import read_pickle, start_of

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


def read_script(path: Path, file: BinaryIO, entries: Mapping[str, zipfile.ZipInfo], root: str) -> object:
    """Return the module in an archive as a `Stub`, its tensors mapped; `root` is the archive's folder in the zip."""
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    assert isinstance(mapped, torch.UntypedStorage)
    data = f"{root}data/"
    spans = {
        name.removeprefix(data): (start_of(file, info), info.file_size)
        for name, info in entries.items()
        if name.startswith(data)
    }
    content = read_pickle(file, entries[f"{root}data.pkl"])
    try:
        return _ScriptUnpickler(io.BytesIO(content), mapped, spans).load()
    except Refused:
        raise
    except Exception as error:  # a damaged pickle makes Python's unpickler raise almost anything
        raise Refused(DAMAGED) from error


class _ScriptUnpickler(pickle.Unpickler):
    """Makes tensors over the mapped file, plain containers and stubs, and can make nothing else.

    `spans` has the offset and the length of each storage in the file, by its key.
    """

    def __init__(self, stream: io.BytesIO, mapped: torch.UntypedStorage, spans: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(stream)
        self.mapped, self.spans = mapped, spans
        self.copies: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        # A new function each time: a pickle can set attributes of what it is given.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _rebuild(*arguments)
        if module == "torch.jit._pickle":  # wraps lists and dicts to restore their types
            return lambda value, *_: value
        return make_stub(allowed_name(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, torch.UntypedStorage]:
        _, dtype, key, _, elements = pid
        start, size = self.spans[key]
        if not isinstance(dtype, torch.dtype) or elements * dtype.itemsize > size:
            raise ValueError(f"the data of storage {key} is cut off")
        if start % dtype.itemsize == 0:
            return dtype, self.mapped[start : start + size]
        # torch insists on aligned data. One copy for each key: a small pickle may name it very often.
        if key not in self.copies:
            self.copies[key] = self.mapped[start : start + size].clone()
        return dtype, self.copies[key]


def _rebuild(
    storage: tuple[torch.dtype, torch.UntypedStorage],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> Tensor:
    return torch.empty(0, dtype=storage[0]).set_(storage[1], offset, size, stride)
