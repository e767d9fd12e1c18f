"""Pieces of pickles: operations, tensors, and programs that must never run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping

from .corpus import RAN, bad, legacy, whole


def program(module: str, name: str, *arguments, protocol: int = 2) -> bytes:
    """Return a pickle that calls a function by its name, which need not exist."""
    given = pickle.dumps(arguments, protocol).removesuffix(b".")[2 if protocol > 1 else 0 :]
    return (bytes([0x80, protocol]) if protocol > 1 else b"") + f"c{module}\n{name}\n".encode() + given + b"R."


MAKE = f"__import__('os').mkdir('{RAN}')"
BOMBS = {
    "os.system": program("os", "system", f"mkdir {RAN}"),
    "posix.system": program("posix", "system", f"mkdir {RAN}"),
    "os.mkdir": program("os", "mkdir", RAN),
    "builtins.eval": program("builtins", "eval", MAKE),
    "py2-eval": program("__builtin__", "eval", MAKE),
    "builtins.exec": program("builtins", "exec", MAKE),
    "subprocess.call": program("subprocess", "call", ["mkdir", RAN]),
    "subprocess.Popen": program("subprocess", "Popen", ["mkdir", RAN]),
    "importlib": program("importlib", "import_module", "antigravity"),
    "runpy": program("runpy", "run_path", f"{RAN}.py"),
    "getattr": program("builtins", "getattr", OrderedDict, "fromkeys"),
    "torch.load": program("torch.serialization", "load", f"{RAN}.pt"),
    "torch.hub": program("torch.hub", "load", "owner/name", "model"),
    "torch.jit": program("torch.jit", "load", f"{RAN}.pt"),
    "numpy.load": program("numpy", "load", f"{RAN}.npy"),
    "torch.ops": program("torch._ops", "load_library", f"{RAN}.so"),
    "name-that-begins-like-a-clips": program("clip_evil", "run", RAN),
    "name-that-ends-like-a-clips": program("os.open_clip", "system", f"mkdir {RAN}"),
    "name-in-two-parts": program("collections", "OrderedDict.fromkeys", [1]),
    "name-with-a-space": program("os system", "OrderedDict", [1]),
    "name-of-a-novel": program("os" * 10_000, "system", RAN),
    "name-that-is-not-ascii": program("оs", "system", RAN),
}


class Bomb:
    """Its pickle calls os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (RAN,)


def nested(value, depth: int = 40):
    """Return the value inside many dicts, lists and tuples."""
    for _ in range(depth):
        value = OrderedDict(a=[{"b": (value,)}])
    return value


def rebuilt(archive: bytes, replaced: Mapping[str, bytes]) -> bytes:
    """Return a zip with some entries replaced or added, by the last part of their names; nothing is compressed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            if name.removeprefix(f"{root}/") not in replaced:
                new.writestr(name, old.read(name))
        for name, content in replaced.items():
            new.writestr(f"{root}/{name}", content)
    return made.getvalue()


def in_zip(data: bytes) -> Callable[[], bytes]:
    """Return a function for a state dict's file with another pickle in it."""
    return lambda: rebuilt(whole("zip"), {"data.pkl": data})


def in_script(data: bytes) -> Callable[[], bytes]:
    """Return a function for a TorchScript archive with another pickle in it."""
    return lambda: rebuilt(whole("script"), {"data.pkl": data})


def in_legacy(data: bytes) -> Callable[[], bytes]:
    """Return a function for a file of torch before 1.6 with other objects in it, and no data."""

    def make() -> bytes:
        empty, nothing = legacy({}), pickle.dumps({}, 2)
        return empty.replace(nothing, data, 1)

    return make


def everywhere(id: str, data: bytes, **expected) -> None:
    for where, make in (("a-zip", in_zip), ("a-script", in_script), ("a-legacy-file", in_legacy)):
        merge = {} if make is in_zip else {"merge": None}  # to merge it is to read it as before
        bad(f"{id}-in-{where}", make(data), ".pt", **merge, **expected)


HEAD, CLIP = b"\x80\x02", b"cclip.model\nCLIP\n"
SYSTEM = b"cposix\nsystem\n"


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


FLOATS = b"(" + word("storage") + b"ctorch\nFloatStorage\n"


def storage(elements: int, key: str = "0") -> bytes:
    return FLOATS + word(key) + word("cpu") + number(elements) + b"tQ"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(elements: int, size: tuple, stride: tuple, offset: int = 0, key: str = "0") -> bytes:
    """Return the operations that make a tensor over a storage."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(elements, key)
        + number(offset)
        + numbers(*size)
        + numbers(*stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def in_dict(*items: tuple[str, bytes]) -> bytes:
    return HEAD + b"}(" + b"".join(word(name) + value for name, value in items) + b"u."


PROJ = "visual.proj"
