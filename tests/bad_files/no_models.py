"""Model files that are cut off, and files that are no models at all."""

from __future__ import annotations

import io
import tarfile
import zipfile

import torch

from .corpus import bad, cut, whole

for _length in (0, 1, 7, 8, 9, 10, 100, 2000, 4000, 20_000, -1):
    bad(f"cut-safetensors-{_length}", cut("openai", _length))
for _kind, _lengths in (
    ("zip", (1, 3, 4, 30, 64, 1000, 5000, 30_000, -22, -1)),
    ("legacy", (1, 2, 10, 30, 600, 3000, 20_000, -1)),
    ("module", (5000, 40_000, -1)),
    ("script", (4, 500, 50_000, -23, -1)),
):
    for _length in _lengths:
        bad(f"cut-{_kind}-{_length}", cut(_kind, _length), ".pt")
bad("longer-than-it-says", lambda: whole("openai") + b"\0")
bad("random-bytes", lambda: torch.randint(0, 256, (5000,), generator=torch.manual_seed(0)).byte().numpy().tobytes())
bad("random-bytes-after-the-mark-of-a-pickle", b"\x80\x02" + bytes(range(256)) * 9, ".pt")
bad("random-bytes-after-the-mark-of-a-zip", b"PK\x03\x04" + bytes(range(256)) * 9, ".pt")
bad("zeros", bytes(10_000))
bad("text", b"these are not weights at all\n" * 20)
bad("web-page", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")
bad("web-page-without-doctype", b"\n\n  <HTML><head></head></HTML>")
bad("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
bad("gguf", b"GGUF\x03\0\0\0" + bytes(500))
bad("png", b"\x89PNG\r\n\x1a\n" + bytes(500), ".pt")
bad("gzip", b"\x1f\x8b\x08\0" + bytes(500), ".bin")
bad("numpy", b"\x93NUMPY\x01\0v\0" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n" + bytes(12))
bad("json-object", b'{"text_model": [1, 2, 3]}')


def packed_zip(method: int, **files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return made.getvalue()


def tar(name: str = "archive/pickle") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"\x80\x02K."))
    return made.getvalue()


bad("zip-of-texts", lambda: packed_zip(zipfile.ZIP_STORED, readme=b"hello"), ".pt")
bad("zip-of-a-model", lambda: packed_zip(zipfile.ZIP_STORED, model=whole("openai")))
bad("zip-without-entries", lambda: b"PK\x03\x04" + packed_zip(zipfile.ZIP_STORED), ".pt")
bad("tar", tar, ".pt")
bad("tar-with-the-mark-of-a-pickle", lambda: tar("\x80\x02entry"), ".pt")
