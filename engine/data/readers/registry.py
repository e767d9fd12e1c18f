"""The caption formats, in the order in which they are tried. A new one is a record here, its code and its test.

A reader either knows what it reads or says what it does not know: where it reads no captions, it returns briefly why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..images.folder_tree import Tree
from .class_folders import read_class_folders
from .coco import is_coco_member, read_coco, read_coco_beside, write_coco
from .columns import ChosenColumns
from .kohya import is_kohya_member, read_kohya, write_kohya
from .labels_json import is_labels_member, read_labels_json, write_labels_json
from .metadata import is_metadata, write_metadata
from .parsed import FileCaptions, ParsedCaptions, Source
from .records import read_caption_rows, read_class_rows, read_prompt_rows
from .sidecars import read_sidecars, write_sidecar
from .tables import write_csv


@dataclasses.dataclass(frozen=True)
class CaptionFiles:
    """A format of files with the captions of many images.

    A file with one of the `suffixes` is recognised by the columns of its table or records (`sniff_columns`), or by a
    member of its JSON object (`sniff_member`). `read` returns its contents, or briefly why there are no captions.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path, Source], FileCaptions | str]
    sniff_member: Callable[[str, Any], bool] | None = None
    sniff_columns: Callable[[Path, ChosenColumns], bool] | None = None


@dataclasses.dataclass(frozen=True)
class CaptionWriter:
    """`write` yields the text of the file `file_name` from (image name, captions) pairs. Without that name, each image
    has a .txt file of its own."""

    write: Callable[[Sequence[tuple[str, Sequence[str]]]], Iterator[str]]
    file_name: str = ""


@dataclasses.dataclass(frozen=True)
class CaptionFormat:
    """One way in which captions or classes are stored: in caption `files`, or as the layout of the folder shows.

    `help` completes "name: …", `holds` "the file holds …". `read_folder` is asked where no caption file was read; it
    returns what it reads, or briefly why it cannot ("" if nothing looks like this format).
    """

    name: str
    help: str
    holds: str = "captions"
    files: CaptionFiles | None = None
    read_folder: Callable[[Tree], ParsedCaptions | str] | None = None
    writer: CaptionWriter | None = None


def _holding(*contents: str) -> Callable[[Path, ChosenColumns], bool]:
    return lambda file, columns: columns.content in contents


_TABLES = (".csv", ".tsv", ".txt")  # .txt only under the names in caption_files.py
CAPTION_FORMATS = (
    CaptionFormat(
        "json",
        'a labels JSON, {"image.jpg": ["a caption"]}',
        files=CaptionFiles((".json",), read_labels_json, sniff_member=is_labels_member),
        writer=CaptionWriter(write_labels_json, "labels.json"),
    ),
    CaptionFormat(
        "kohya",
        "meta_cap.json of kohya's scripts",
        "kohya's captions",
        CaptionFiles((".json",), read_kohya, sniff_member=is_kohya_member),
        writer=CaptionWriter(write_kohya, "meta_cap.json"),
    ),
    CaptionFormat(
        "coco",
        "COCO's caption annotations",
        "COCO captions",
        CaptionFiles((".json",), read_coco, sniff_member=is_coco_member),
        read_folder=read_coco_beside,
        writer=CaptionWriter(write_coco, "captions.json"),
    ),
    CaptionFormat(
        "metadata",
        "Hugging Face's metadata.jsonl",
        "Hugging Face metadata with captions",
        CaptionFiles((".jsonl", ".json", *_TABLES), read_caption_rows, sniff_columns=is_metadata),
        writer=CaptionWriter(write_metadata, "metadata.jsonl"),
    ),
    CaptionFormat(
        "csv",
        "a CSV that begins with the line image,caption",
        files=CaptionFiles(_TABLES, read_caption_rows, sniff_columns=_holding("captions")),
        writer=CaptionWriter(write_csv, "captions.csv"),
    ),
    CaptionFormat(
        "interrogator",
        "CLIP Interrogator's table of prompts",
        "CLIP Interrogator's prompts",
        CaptionFiles(_TABLES, read_prompt_rows, sniff_columns=_holding("prompts")),
    ),
    CaptionFormat(
        "labels",
        "a table, records or Parquet file with a class for each image",
        "classes",
        CaptionFiles((".jsonl", ".json", *_TABLES, ".parquet"), read_class_rows, sniff_columns=_holding("classes")),
    ),
    CaptionFormat(
        "parquet",
        "Parquet files that name or hold the images",
        files=CaptionFiles((".parquet",), read_caption_rows, sniff_columns=_holding("captions", "prompts")),
    ),
    CaptionFormat(
        "sidecar", "a text file beside each image", read_folder=read_sidecars, writer=CaptionWriter(write_sidecar)
    ),
    CaptionFormat("folders", "a subfolder for each class", read_folder=read_class_folders),
)
FORMAT_NAMES = ("auto", *(known.name for known in CAPTION_FORMATS))
WRITERS = {known.name: known.writer for known in CAPTION_FORMATS if known.writer}
