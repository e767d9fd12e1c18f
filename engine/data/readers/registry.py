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
from .metadata import write_metadata
from .parsed import FileCaptions, ParsedCaptions, Source
from .records import read_caption_rows, read_class_rows, read_prompt_rows
from .sidecars import TEXT_SUFFIXES, read_sidecars, write_sidecar
from .tables import write_csv

_TABLES = (".csv", ".tsv", ".txt")  # .txt only under the names in caption_files.py


@dataclasses.dataclass(frozen=True)
class Clue:
    """What the beginning of a file shows: the columns of a table or of records, or one member of a JSON object."""

    file: Path
    columns: ChosenColumns | None = None
    member: tuple[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionFormat:
    """One way in which captions or classes are stored.

    `help` completes "name: …", `holds` "the file holds …". A format of caption files has their `suffixes`, `sniff` that
    recognises one by a clue, and `read_file`; one that the layout of a folder shows has `read_folder`. Readers return
    what they read, or briefly why they cannot ("" if there is nothing of this format).

    `write`, None where a format is only read, returns the text of the caption file `file_name` from (image name,
    captions) pairs; with no `file_name` each image gets a file of its own with the first of the `suffixes`.
    """

    name: str
    help: str
    holds: str = "captions"
    suffixes: tuple[str, ...] = ()
    sniff: Callable[[Clue], bool] | None = None
    read_file: Callable[[Path, Source], FileCaptions | str] | None = None
    read_folder: Callable[[Tree], ParsedCaptions | str] | None = None
    has_columns: bool = False  # that the user may choose
    file_name: str = ""
    write: Callable[[Sequence[tuple[str, Sequence[str]]]], Iterator[str]] | None = None

    def recognises(self, clue: Clue) -> bool:
        return self.sniff is not None and self.sniff(clue)


def _sniff_member(recognise: Callable[[str, Any], bool]) -> Callable[[Clue], bool]:
    return lambda clue: clue.member is not None and recognise(*clue.member)


def _is_metadata(clue: Clue) -> bool:
    if clue.columns is None or clue.columns.content == "classes":
        return False
    if clue.file.suffix.lower() in (".json", ".jsonl"):
        return True
    return clue.columns.content == "captions" and clue.file.stem.lower() == "metadata"


def _sniff_content(*contents: str) -> Callable[[Clue], bool]:
    return lambda clue: clue.columns is not None and clue.columns.content in contents


CAPTION_FORMATS: tuple[CaptionFormat, ...] = (
    CaptionFormat(
        name="json",
        help='a labels JSON, {"image.jpg": ["a caption"]}',
        suffixes=(".json",),
        sniff=_sniff_member(is_labels_member),
        read_file=read_labels_json,
        file_name="labels.json",
        write=write_labels_json,
    ),
    CaptionFormat(
        name="kohya",
        help="meta_cap.json of kohya's scripts",
        holds="kohya's captions",
        suffixes=(".json",),
        sniff=_sniff_member(is_kohya_member),
        read_file=read_kohya,
        file_name="meta_cap.json",
        write=write_kohya,
    ),
    CaptionFormat(
        name="coco",
        help="COCO's caption annotations",
        holds="COCO captions",
        suffixes=(".json",),
        sniff=_sniff_member(is_coco_member),
        read_file=read_coco,
        read_folder=read_coco_beside,
        file_name="captions.json",
        write=write_coco,
    ),
    CaptionFormat(
        name="metadata",
        help="Hugging Face's metadata.jsonl",
        holds="Hugging Face metadata with captions",
        suffixes=(".jsonl", ".json", *_TABLES),
        sniff=_is_metadata,
        has_columns=True,
        read_file=read_caption_rows,
        file_name="metadata.jsonl",
        write=write_metadata,
    ),
    CaptionFormat(
        name="csv",
        help="a CSV that begins with the line image,caption",
        suffixes=_TABLES,
        sniff=_sniff_content("captions"),
        has_columns=True,
        read_file=read_caption_rows,
        file_name="captions.csv",
        write=write_csv,
    ),
    CaptionFormat(
        name="interrogator",
        help="CLIP Interrogator's table of prompts",
        holds="CLIP Interrogator's prompts",
        suffixes=_TABLES,
        sniff=_sniff_content("prompts"),
        has_columns=True,
        read_file=read_prompt_rows,
    ),
    CaptionFormat(
        name="labels",
        help="a table, records or Parquet file with a class for each image",
        holds="classes",
        suffixes=(".jsonl", ".json", *_TABLES, ".parquet"),
        sniff=_sniff_content("classes"),
        has_columns=True,
        read_file=read_class_rows,
    ),
    CaptionFormat(
        name="parquet",
        help="Parquet files that name or hold the images",
        suffixes=(".parquet",),
        sniff=_sniff_content("captions", "prompts"),
        has_columns=True,
        read_file=read_caption_rows,
    ),
    CaptionFormat(
        name="sidecar",
        help="a text file beside each image",
        suffixes=(*TEXT_SUFFIXES, ".json"),
        read_folder=read_sidecars,
        write=write_sidecar,
    ),
    CaptionFormat(name="folders", help="a subfolder for each class", read_folder=read_class_folders),
)
FORMAT_NAMES = ("auto", *(known.name for known in CAPTION_FORMATS))
WRITABLE_FORMATS = {known.name: known for known in CAPTION_FORMATS if known.write}
