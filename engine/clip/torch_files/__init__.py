"""Read weights out of torch's files (`.pt`, `.bin`, `.ckpt`, TorchScript archives) without running anything in them.

A pickle is a program. `pickle_check` first reads it as data: each operation and each name that it asks for must be on a
list. Then torch's own `weights_only` reader makes the tensors, and every class of a pickled model becomes an inert stub
that holds attributes and nothing else (`objects`). TorchScript archives are read by an unpickler that knows tensors and
stubs only (`script`); the code in them is not even looked at.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...errors import UserError
from ..architecture import Activation, Hints
from .objects import check_storages, make_stub, named_tensors
from .pickle_check import DAMAGED, MAX_OPERATIONS, MAX_PICKLE_BYTES, Refused, check_pickle, is_stubbed
from .script import read_script
from .zip_entries import ZIP_MARK, check_entry, read_entries, read_pickle

PICKLE_MARK = b"\x80"


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], Hints]:
    """Return the named tensors (CPU) of a file that torch wrote, and what the classes in it say about the model.

    Reads state dicts, training checkpoints with one, whole pickled models and TorchScript archives. Zip files are
    memory-mapped. Raises `UserError` that names the file and what to do.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == ZIP_MARK
            loaded, names = _read_zip(path, file) if zipped else _read_legacy(path, file)
        tensors, heads = named_tensors(loaded)
        check_storages(tensors)
    except Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); choose another file.") from error
    return tensors, Hints(heads, _activation(names))


def _read_zip(path: Path, file: BinaryIO) -> tuple[object, set[str]]:
    """Return the object in a zip file, and the names of the classes that its pickle asks for."""
    entries = read_entries(file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("is a zip file, but not one of torch's; unpack it, and use the model in it.")
    root = pickles[0].removesuffix("data.pkl")
    script = any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in entries)
    size = path.stat().st_size
    # The code of a script is compressed; it is not read.
    read = [e for name, e in entries.items() if not script or name == pickles[0] or name.startswith(f"{root}data/")]
    for info in read:
        check_entry(info, size)
    if sum(info.file_size for info in read) > size:
        raise Refused("is a zip file in which several files are in one place; download or save it again.")
    names = check_pickle(io.BytesIO(read_pickle(file, entries[pickles[0]]))).names
    if script:
        return read_script(path, file, entries, root), names
    return _load(path, names, mmap=True), names


def _read_legacy(path: Path, file: BinaryIO) -> tuple[object, set[str]]:
    """Return what `_read_zip` does, from the format before torch 1.6: five pickles, then the data of the storages.

    The pickles are a magic number, the protocol's version, the sizes of C types, the objects, and the storages' keys.
    """
    file.seek(0)
    stream, size = io.BytesIO(file.read(MAX_PICKLE_BYTES)), path.stat().st_size
    names: set[str] = set()
    operations_left = MAX_OPERATIONS
    for index in range(5):
        summary = check_pickle(stream, operations_left)
        names |= summary.names
        operations_left -= summary.operations
        # torch allocates each storage before it reads the data. `numbers` counts its elements up to four times, as an
        # integer and in its tuple, there and in the shape of a tensor; an element has at least one byte.
        if index == 3 and summary.numbers > 4 * size + 10_000_000:
            raise Refused("claims more weights than it holds; download or save it again.")
    if any(name.startswith("torch.nn.modules.") for name in names):
        raise Refused(
            "is a whole model in the format that torch wrote before version 1.6, which brings its own code; nothing in "
            "it was run. Open it where it was made, and save its state_dict."
        )
    return _load(path, names, mmap=False), names


def _load(path: Path, names: set[str], mmap: bool) -> object:
    """Load a checked pickle with torch's weights_only reader, with stubs for the classes that it asks for."""
    try:
        with torch.serialization.safe_globals([make_stub(name) for name in sorted(names) if is_stubbed(name)]):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise Refused(DAMAGED) from error


def _activation(names: set[str]) -> Activation | None:
    """Return the activation by the classes of a pickled or scripted model."""
    classes = {name.rpartition(".")[2] for name in names}
    if classes & {"QuickGELU", "QuickGELUActivation"}:
        return "quick_gelu"
    return "gelu" if classes & {"GELU", "GELUActivation"} else None
