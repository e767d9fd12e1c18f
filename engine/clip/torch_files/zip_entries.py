"""The entries of a zip file that torch wrote: uncompressed files at known offsets. Anything unusual is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import BinaryIO

from .pickle_check import DAMAGED, MAX_PICKLE_BYTES, TOO_MUCH, Refused

ZIP_MARK = b"PK\x03\x04"
_MAX_DIRECTORY_BYTES = 4 << 20


def read_entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of a zip file by name; raise `Refused` for a damaged one or two entries of one name."""
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError) as error:
        raise Refused(DAMAGED) from error
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise Refused("is a zip file that holds two files of one name; download or save it again.")
    return entries


def check_entry(info: zipfile.ZipInfo, file_size: int) -> None:
    """Refuse an entry that is compressed or cut off. torch compresses no weights, and decompressing can fill a disk."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise Refused("is a packed zip file, as torch never writes one; unpack it, and use the model in it.")
    if info.header_offset + info.file_size > file_size:
        raise Refused("is damaged or cut off; download or save it again.")


def read_pickle(file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    """Return the content of an entry that is a pickle."""
    if info.file_size > MAX_PICKLE_BYTES:
        raise Refused(TOO_MUCH)
    file.seek(start_of(file, info))
    return file.read(info.file_size)


def start_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's content in the file."""
    file.seek(info.header_offset)
    header = file.read(30)  # the local header: fixed fields, then the name and an extra field, then the content
    if len(header) < 30 or header[:4] != ZIP_MARK:
        raise Refused("is damaged; download or save it again.")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return info.header_offset + 30 + name_length + extra_length


def _check_directory(file: BinaryIO) -> None:
    """Refuse a directory so long that Python's zipfile would fill the memory by reading it.

    Its length is in the record that ends the file ("PK 5 6", at offset 12), or, if it says 0xFFFFFFFF there, in the
    zip64 record before that ("PK 6 6", at offset 40). A comment of up to 65,535 bytes may follow.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 66_000))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    length = struct.unpack_from("<I", tail, end + 12)[0] if 0 <= end <= len(tail) - 22 else 0
    if end64 >= 0 and len(tail) - end64 >= 56:
        length64 = struct.unpack_from("<Q", tail, end64 + 40)[0]
        length = length64 if length == 0xFFFFFFFF else max(length, length64)
    if length > _MAX_DIRECTORY_BYTES:
        raise Refused("is a zip file of too many files to be a model; choose another file.")
