"""Zip files and TorchScript archives that are not as torch writes them."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable

from .corpus import ANY, RAN, bad, whole
from .pickle_parts import BOMBS, HEAD, in_dict, rebuilt, tensor


def raw_zip(entries: Iterable[tuple[str, bytes]], **headers) -> bytes:
    """Return a zip of stored entries; `headers` replaces fields of an entry's header, by its name, and of the end."""
    content, directory, count = bytearray(), bytearray(), 0
    for name, data in entries:
        header = {"flags": 0, "method": 0, "packed": len(data), "size": len(data), "offset": len(content), "extra": b""}
        header |= headers.get(name, {})
        middle = struct.pack(
            "<HHHHIIIHH",
            header["flags"],
            header["method"],
            0,
            33,
            zipfile.crc32(data),
            header["packed"],
            header["size"],
            len(name.encode()),
            len(header["extra"]),
        )
        directory += (
            b"PK\1\2" + struct.pack("<HH", 20, 20) + middle + struct.pack("<HHHII", 0, 0, 0, 0, header["offset"])
        )
        directory += name.encode() + header["extra"]
        content += b"PK\3\4" + struct.pack("<H", 20) + middle + name.encode() + header["extra"] + data
        count += 1
    end = {"count": count & 0xFFFF, "length": len(directory), "offset": len(content)} | headers.get("end", {})
    finish = struct.pack("<HHHHIIH", 0, 0, end["count"], end["count"], end["length"], end["offset"], 0)
    return bytes(content + directory) + headers.get("end64", b"") + b"PK\5\6" + finish


def state_entries(root: str = "archive") -> list[tuple[str, bytes]]:
    """Return the entries of a state dict's file."""
    with zipfile.ZipFile(io.BytesIO(whole("zip"))) as archive:
        return [(f"{root}/{name.split('/', 1)[1]}", archive.read(name)) for name in archive.namelist()]


def with_header(name: str, **fields) -> Callable[[], bytes]:
    return lambda: raw_zip(state_entries(), **{f"archive/{name}": fields})


def end64(**fields) -> bytes:
    """Return the two records that end a zip of many or large entries."""
    values = {"count": 1, "length": 50, "offset": 0, "at": 0} | fields
    record = struct.pack(
        "<QHHIIQQQQ", 44, 45, 45, 0, 0, values["count"], values["count"], values["length"], values["offset"]
    )
    return b"PK\6\6" + record + b"PK\6\7" + struct.pack("<IQI", 0, values["at"], 1)


BIG = 0xFFFFFFFF
bad("zip-deflated-pickle", with_header("data.pkl", method=8), ".pt")
bad("zip-deflated-data", with_header("data/0", method=8), ".pt")
bad("zip-of-a-method-that-is-not-known", with_header("data/0", method=77), ".pt")
bad("zip-encrypted-pickle", with_header("data.pkl", flags=1), ".pt")
bad("zip-encrypted-data", with_header("data/3", flags=1), ".pt")
bad("zip-larger-than-packed", with_header("data/0", size=1 << 31), ".pt")
bad("zip-entry-larger-than-the-file", with_header("data/0", size=1 << 31, packed=1 << 31), ".pt")
bad("zip-pickle-larger-than-the-file", with_header("data.pkl", size=1 << 31, packed=1 << 31), ".pt")
bad("zip-entry-beyond-the-file", with_header("data/0", offset=1 << 31), ".pt")
bad("zip-pickle-beyond-the-file", with_header("data.pkl", offset=1 << 31), ".pt")
bad("zip-pickle-in-the-middle-of-data", with_header("data.pkl", offset=9000), ".pt")
bad(
    "zip64-entry-of-exabytes",
    with_header("data/0", size=BIG, packed=BIG, extra=struct.pack("<HHQQ", 1, 16, 1 << 60, 1 << 60)),
    ".pt",
)
bad("zip64-pickle-at-exabytes", with_header("data.pkl", offset=BIG, extra=struct.pack("<HHQ", 1, 8, 1 << 62)), ".pt")
bad(
    "zip64-extra-that-is-too-short",
    with_header("data/0", size=BIG, packed=BIG, extra=struct.pack("<HHI", 1, 16, 1)),
    ".pt",
)
bad("zip-two-entries-of-one-name", lambda: raw_zip([*state_entries(), ("archive/data.pkl", BOMBS["os.mkdir"])]), ".pt")
bad("zip-two-pickles", lambda: raw_zip([*state_entries(), ("other/data.pkl", BOMBS["os.mkdir"])]), ".pt")
bad(
    "zip-claims-many-entries",
    lambda: raw_zip(state_entries(), end={"count": 0xFFFE}),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip64-claims-2-to-the-31-entries",
    lambda: raw_zip(
        state_entries(),
        end={"count": 0xFFFF, "length": BIG, "offset": BIG},
        end64=end64(count=1 << 31, length=(1 << 31) * 46),
    ),
    ".pt",
)
bad("zip-directory-longer-than-the-file", lambda: raw_zip(state_entries(), end={"length": 1 << 30}), ".pt")
bad("zip-directory-beyond-the-file", lambda: raw_zip(state_entries(), end={"offset": 1 << 30}), ".pt")
bad("zip-really-many-entries", lambda: raw_zip((f"archive/data/{n}", b"") for n in range(300_000)), ".pt")
bad("zip-no-data", lambda: raw_zip([e for e in state_entries() if "/data/" not in e[0]]), ".pt")
bad("zip-one-storage-missing", lambda: raw_zip([e for e in state_entries() if not e[0].endswith("/data/4")]), ".pt")
bad(
    "zip-names-that-lead-out",
    lambda: raw_zip([*state_entries("../../up"), (f"../{RAN}", b"x")]),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip-absolute-names",
    lambda: raw_zip([*state_entries(), (f"/tmp/{RAN}", b"x")]),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip-in-which-all-data-are-one-entry",
    lambda: raw_zip(state_entries(), **{f"archive/data/{n}": {"offset": 1000} for n in range(40)}),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)


def script_of_clones() -> bytes:
    """Return a TorchScript archive that names one large misaligned storage very often."""
    items = ((f"visual.n{n}", tensor(1_000_000, (1_000_000,), (1,))) for n in range(3000))
    return raw_zip([("x/data.pkl", in_dict(*items)), ("x/data/0", bytes(4_000_000)), ("x/constants.pkl", b"")])


def script_of_overlapping_storages() -> bytes:
    """Return a TorchScript archive in which very many entries share the same bytes of the file."""
    count, size = 2000, 4_000_000
    items = ((f"visual.n{n}", tensor(size // 4, (size // 4,), (1,), key=str(n))) for n in range(count))
    same = {f"x/data/{n}": {"offset": 1, "packed": size, "size": size} for n in range(1, count)}
    data = [("x/data/0", bytes(size)), *((name, b"") for name in same)]
    moved = {name: header | {"offset": 0} for name, header in same.items()}
    return raw_zip([*data, ("x/data.pkl", in_dict(*items)), ("x/constants.pkl", b"")], **moved)


bad("script-of-one-misaligned-storage-very-often", script_of_clones, ".pt")
bad("script-of-overlapping-storages", script_of_overlapping_storages, ".pt")
bad(
    "script-packed-pickle",
    lambda: raw_zip([("x/data.pkl", b"N."), ("x/constants.pkl", b"")], **{"x/data.pkl": {"method": 8}}),
    ".pt",
)
bad("script-without-data", lambda: raw_zip([("x/data.pkl", HEAD + b"N."), ("x/constants.pkl", b"")]), ".pt")
for _id, _name, _bomb in (("constants", "constants.pkl", "posix.system"), ("code", "code/__torch__.py", "os.mkdir")):
    bad(
        f"script-with-a-bomb-for-{_id}",
        lambda n=_name, b=_bomb: rebuilt(whole("script"), {n: BOMBS[b]}),
        ".pt",
        load=ANY,
        info=ANY,
        merge=ANY,
    )
