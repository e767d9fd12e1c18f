"""Caption files in a folder: what each of them is, what it holds, and where the pictures that it names lie."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from ..images.folder_tree import Tree, is_image, joined
from ..images.image_files import file_of
from ..originals import NAME as ORIGINALS
from . import json_files, parquet, tables
from .caption_texts import in_lines
from .parsed import Reading
from .tables import Columns

_LOOKED_FOR = 8  # pictures that are looked for to see where a file's names start
_MOST_FOLDERS = 10_000  # in which they are

_JSON, _TABLES = (".json",), (".csv", ".tsv")
# A table although its name says otherwise: Flickr8k's captions are often found so.
_TABLE_NAMES = ("captions.txt",)
_SUFFIXES = {
    "json": _JSON,
    "kohya": _JSON,
    "coco": _JSON,
    "metadata": (".jsonl", ".json", *_TABLES),
    "csv": _TABLES,
    "interrogator": _TABLES,
    "labels": (".jsonl", ".json", *_TABLES, ".parquet"),
    "parquet": (".parquet",),
}
_WORDS = {
    "json": "captions",
    "kohya": "captions in kohya's way",
    "coco": "COCO's captions",
    "metadata": "captions in Hugging Face's way",
    "csv": "captions",
    "interrogator": "CLIP Interrogator's prompts",
    "labels": "classes",
    "parquet": "captions",
}
_CLASSIFIERS: dict[str, Callable[[Path, Columns], tuple[str | None, str]]] = {
    ".json": json_files.kind_of_json,
    ".jsonl": json_files.kind_of_lines,
    ".csv": tables.kind_of_table,
    ".tsv": tables.kind_of_table,
    ".txt": tables.kind_of_table,
    ".parquet": parquet.kind_of_parquet,
}

_DISPUTED = "{} pictures have rows that do not agree; their class is what most say, or each of those that as many say."


class Source:
    """The files of a folder, or a single caption file (`single`), and what its caption files are."""

    def __init__(self, tree: Tree, columns: Columns, single: bool = False):
        self.tree, self.columns, self.single = tree, columns, single
        self.kinds: dict[Path, tuple[str | None, str]] = {}

    def caption_files(self, suffixes: Sequence[str]) -> Iterator[str]:
        """Paths, from the top, of files that may hold the captions of many pictures."""
        for folder, name in self.tree.files((*suffixes, ".txt") if ".csv" in suffixes else suffixes):
            if name == ORIGINALS or (name.lower().endswith(".txt") and name.lower() not in _TABLE_NAMES):
                continue
            if self.single or not (name.lower().endswith(".json") and self.tree.is_beside_an_image(folder, name)):
                yield joined(folder, name)

    def kind_of(self, file: Path) -> tuple[str | None, str]:
        """(the file's format or None, in a few words what it is or which columns hold its captions)."""
        if file not in self.kinds:
            self.kinds[file] = _CLASSIFIERS[file.suffix.lower()](file, self.columns)
        return self.kinds[file]

    def unread(self, kind: str) -> list[str]:
        """Sentences about the caption files of other formats than the one that is read."""
        notes = []
        for name in self.caption_files(tuple(_CLASSIFIERS)):
            with contextlib.suppress(UserError):  # what is damaged is not read either
                found = self.kind_of(self.tree.top / name)[0]
                if found not in (None, kind):
                    notes.append(f"{name} is not read, because {kind} goes first; for it, choose captions: {found}.")
        return notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """What one caption file holds: captions or classes by picture name, and the folder that the names start from."""

    start: str
    found: dict[str, str]
    disputed: int = 0


def read_file(file: Path, kind: str, columns: Columns) -> Reading | str:
    """A single caption file, or in a few words what it is if it holds no captions. Raises `UserError`."""
    source = Source(Tree(file.parent, (("", (file.name,)),)), columns, single=True)
    if file.name not in source.caption_files(tuple(_CLASSIFIERS)):
        return "is not a caption file"
    found, words = source.kind_of(file)
    if found is None:
        return f"{words}, not captions by picture"
    if kind not in ("auto", found):
        return f"holds {_WORDS[found]}, which is {found} and not {kind}"
    part = _part(source, file, found)
    if isinstance(part, str):
        return part
    return _with_notes(_rows(found, f"{file.name} was chosen", [part]), [file], columns)


def read_files(kind: str, source: Source) -> Reading | str:
    """All caption files of one format, wherever in the folder they are."""
    read, others, parts, files = [], [], [], []
    for name in source.caption_files(_SUFFIXES[kind]):
        found, words = source.kind_of(source.tree.top / name)
        if found == kind:
            part = _part(source, source.tree.top / name, kind)
            if isinstance(part, _Part):
                read.append(f"{name} (columns {words})" if words else name)
                parts.append(part)
                files.append(source.tree.top / name)
            else:
                source.kinds[source.tree.top / name] = (None, part)
                others.append(f"{name} {part}")
        elif found is None:
            others.append(f"{name} {words}")
    if not parts:
        return others[0] if others else ""
    more = f" and {len(read) - 1} more" if len(read) > 1 else ""
    reading = _rows(kind, f"{read[0]}{more} {'hold' if more else 'holds'} {_WORDS[kind]}", parts)
    return _with_notes(reading, files, source.columns)


def _with_notes(reading: Reading, files: Sequence[Path], columns: Columns) -> Reading:
    files = [file for file in files if file.suffix.lower() == ".parquet"]
    return dataclasses.replace(reading, notes=[*reading.notes, *parquet.notes_on(files, columns)])


def read_coco_files(source: Source) -> Reading | str:
    """COCO's captions lie in the folder `annotations` beside the folders of the pictures, which may be opened alone."""
    reading, top = read_files("coco", source), source.tree.top
    file = coco_file_beside(top)
    if isinstance(reading, Reading) or not os.path.isfile(file) or not source.tree.images:
        return reading
    found = json_files.read_coco(file)
    if isinstance(found, str):
        return f"../annotations/{file.name} {found}"
    part = _Part(start=str(top), found=found)
    return _rows("coco", f"../annotations/{file.name} holds {_WORDS['coco']}", [part])


def coco_file_beside(folder: Path) -> Path:
    """Where COCO has the captions of a folder's pictures; it need not be there."""
    return folder.absolute().parent / "annotations" / f"captions_{folder.absolute().name}.json"


def _part(source: Source, file: Path, kind: str) -> _Part | str:
    disputed = 0
    if kind in ("json", "kohya"):
        found = json_files.read_labels(file)
    elif kind == "coco":
        found = json_files.read_coco(file)
    elif kind == "labels":
        found, disputed = _classes_reader(file)(file, source.columns)
    elif kind == "parquet":
        found = parquet.read_parquet(file, source.columns)
    elif file.suffix.lower() in (".json", ".jsonl"):
        found = json_files.read_records(file, source.columns)
    else:
        found = tables.read_table(file, source.columns)
    if isinstance(found, str):
        return found
    if kind == "kohya":
        found = _with_extensions(found, source, file)
    return _Part(start=_start(source, file, found), found=found, disputed=disputed)


def _classes_reader(file: Path) -> Callable[[Path, Columns], tuple[dict[str, str], int]]:
    readers = {".parquet": parquet.read_classes, ".json": json_files.read_classes, ".jsonl": json_files.read_classes}
    return readers.get(file.suffix.lower(), tables.read_classes)


def _rows(kind: str, reason: str, parts: Sequence[_Part]) -> Reading:
    """One row a picture, also where several files tell of it; of several classes a row each."""
    by_start: dict[str, dict[str, str]] = {}
    for part in parts:
        rows = by_start.setdefault(part.start, part.found)
        if rows is part.found:
            continue
        for name, text in part.found.items():
            both = name in rows and kind != "labels"
            rows[name] = in_lines([*rows[name].split("\n"), *text.split("\n")]) if both else rows.get(name, text)

    def each(value: str) -> Sequence[str]:
        return value.split("\n") if kind == "labels" else (value,)

    names = [name for rows in by_start.values() for name, value in rows.items() for _ in each(value)]
    values = [one for rows in by_start.values() for value in rows.values() for one in each(value)]
    disputed = sum(part.disputed for part in parts)
    return Reading(
        format=kind,
        reason=reason,
        names=names,
        captions=[""] * len(names) if kind == "labels" else values,
        classes=values if kind == "labels" else None,
        origins=[start for start, rows in by_start.items() for value in rows.values() for _ in each(value)],
        notes=[_DISPUTED.format(disputed)] if disputed else [],
    )


# ---- where the pictures are that a caption file names ----------------------------------------------------------------


def _start(source: Source, file: Path, names: dict[str, str]) -> str:
    """The folder that a file's names start from: its own, where `ClipDataset.path` seeks in `images` too; or, if of
    some that are sought none is there, the one of the data set's folders in which most are."""
    own, top = str(file.parent), str(source.tree.top)
    sought = [name.replace("\\", "/") for name in itertools.islice(names, 0, None, len(names) // _LOOKED_FOR or 1)]
    sought = [name for name in sought if not os.path.isabs(name) and ".." not in name.split("/")]
    above = os.path.dirname(own) if source.single or own != top else own
    usual = (own, os.path.join(own, "images"), os.path.join(above, "images"), top)
    if not sought or any(_there(place, name) for place in usual for name in sought):
        return own
    places = _coco_folders(file) if source.kind_of(file)[0] == "coco" else []
    places += _subfolders(file.parent) if source.single else _folders_with(source.tree, sought)
    found = [(sum(_there(place, name) for name in sought), place) for place in places[:_MOST_FOLDERS]]
    most = max((count for count, _ in found), default=0)
    start = next((place for count, place in found if count == most), own) if most else own
    if not source.single and os.path.relpath(start, top).startswith(os.pardir):
        raise UserError(
            f"{top} holds COCO's captions of the pictures in {start}; choose the folder that both are in, or that of "
            "the pictures."
        )
    return start


def _there(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, file_of(name)))


def _folders_with(tree: Tree, names: Sequence[str]) -> list[str]:
    """Folders that some of these names may start from."""
    places: dict[str, None] = {}
    for name in names:
        above, _, base = name.rpartition("/")
        for folder in tree.folders_with(base):
            if not above or folder == above or folder.endswith("/" + above):
                places[str(tree.top / folder[: len(folder) - len(above)])] = None
    return list(places)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # a folder that may be entered but not listed
        return []


def _coco_folders(file: Path) -> list[str]:
    """The pictures of annotations/captions_train2017.json are in train2017 or images/train2017."""
    part, above = file.stem.removeprefix("captions_"), file.absolute().parent.parent
    return [str(place) for place in (above / part, above / "images" / part) if os.path.isdir(place)]


def _with_extensions(found: dict[str, str], source: Source, file: Path) -> dict[str, str]:
    """kohya's scripts name a picture without its extension, or by its whole path: the name from the file's folder."""
    if all(is_image(name) and not os.path.isabs(name) for name in found):
        return found
    tree = Tree.of(file.parent) if source.single else source.tree
    resolved: dict[str, str] = {}
    for name, text in found.items():
        resolved[_resolved(name, tree, file)] = text
    return resolved


def _resolved(name: str, tree: Tree, file: Path) -> str:
    plain = name.replace("\\", "/")
    stem = os.path.splitext(plain)[0] if is_image(plain) else plain
    places = tree.stems.get(stem.rpartition("/")[2], [])
    if not places:
        return name
    alike = [place for place in places if f"/{os.path.splitext(place)[0]}".endswith(f"/{stem.lstrip('/')}")]
    return os.path.relpath(tree.top / (alike or places)[0], file.parent).replace(os.sep, "/")
