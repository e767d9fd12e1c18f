"""Captions into another format, in a new place, with the pictures, so that what is written opens as a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from ..dataset import ClipDataset
from ..images.image_files import BrokenImage, file_of, open_bytes, row_of, suffix_of
from ..load import load_dataset
from ..originals import HEADER as ORIGINALS_HEADER
from ..originals import NAME as ORIGINALS
from ..readers.registry import WRITERS, CaptionWriter


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A picture's file, its name in the new place, and its captions."""

    path: Path
    name: str
    captions: tuple[str, ...]
    index: int


def convert_captions(
    dataset: ClipDataset,
    to: str,
    out: str | os.PathLike,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write a data set's captions as `to`, one of `WRITERS`, and say in sentences what was done.

    `out` is a new folder, which gets the pictures too: as hard links where they can be made, else as copies; or a new
    file (.json, .jsonl or .csv), which gets the captions alone. The source is not touched. What was written is read
    back before it is moved to its place. Raises `UserError`.
    """
    place = Path(out)
    if to not in WRITERS:
        raise UserError(f"Captions cannot be written as {to!r}; choose {', '.join(WRITERS)}.")
    target = WRITERS[to]
    alone = bool(target.file_name) and place.suffix.lower() == Path(target.file_name).suffix
    _refuse(dataset, place, alone)
    samples, notes = _samples(
        dataset, unique_stems=not target.file_name, start=place.absolute().parent if alone else None
    )
    with _new_place(place, alone) as beside:
        if alone:
            _write_file(beside, target, samples)
            notes += _where(dataset, place, samples)
        else:
            notes += _write_folder(beside, target, samples, dataset, on_progress)
        _read_back(beside, to, samples)
    captions = sum(len(sample.captions) for sample in samples)
    return [f"Wrote {captions} captions of {len(samples)} pictures to {place}.", *notes]


def _refuse(dataset: ClipDataset, place: Path, alone: bool) -> None:
    if os.path.lexists(place) and (alone or not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is already there; choose a name that is not taken.")
    whole_folder = dataset.roots in ((), (str(dataset.folder),))  # and not a caption file, which others may lie beside
    if whole_folder and place.resolve().is_relative_to(dataset.folder.resolve()):
        raise UserError(f"{place} is inside the data set {dataset.folder}, which stays as it is; choose another place.")


def _samples(dataset: ClipDataset, *, unique_stems: bool, start: Path | None) -> tuple[list[_Sample], list[str]]:
    """What is written, with names from `start` where pictures lie below it, else from the data set's folder."""
    missing, taken, samples = set(dataset.missing()), set[str](), []
    for index in range(len(dataset)):
        if index in missing and start is None:
            continue
        path = dataset.path(index)
        if row_of(path) is not None and start is not None:
            raise UserError(
                f"{dataset.name} has its pictures inside Parquet files, where other programs do not find them; give a "
                "new folder, which gets the pictures too."
            )
        try:
            name = _free(_name(dataset, path, start), taken, unique_stems)
        except BrokenImage:  # a row without a picture
            missing.add(index)
            continue
        samples.append(_Sample(path, name, dataset.training_captions(index), index))
    if not samples:
        raise UserError(f"{dataset.folder} has none of the pictures that its captions are of; nothing was written.")
    notes = [f"{len(missing)} pictures are not there and are left out."] if missing and start is None else []
    if dataset.has_labels:
        notes.append(f"Classes are written as captions, such as {samples[0].captions[0]!r}.")
    return samples, notes


def _name(dataset: ClipDataset, path: Path, start: Path | None) -> str:
    tops = [*([start] if start else []), dataset.folder, *map(Path, dataset.roots)]
    top = next((top for top in tops if path.is_relative_to(top)), path.parent)
    if (row := row_of(path)) is not None:
        file = Path(file_of(str(path)))
        return f"{file.relative_to(top).with_suffix('').as_posix()}_{row:06}{suffix_of(path)}"
    return path.relative_to(top).as_posix()


def _free(name: str, taken: set[str], unique_stems: bool) -> str:
    """The name, numbered if another sample has it; for sidecars, if the text of another has."""
    stem, suffix = os.path.splitext(name)
    found, number = name, 1
    while (key := os.path.splitext(found)[0] if unique_stems else found) in taken:
        number += 1
        found = f"{stem}_{number}{suffix}"
    taken.add(key)
    return found


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_place(place: Path, alone: bool) -> Iterator[Path]:
    """A hidden folder or file beside the place, moved there in the end; gone if something is raised."""
    target = place.absolute()
    beside = target.with_name(f".{secrets.token_hex(4)}.part{target.suffix if alone else ''}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not alone:
            beside.mkdir()
        yield beside
        if target.is_dir():
            target.rmdir()  # an empty one, which Windows does not replace
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}); choose another place.") from error
    finally:
        beside.unlink(missing_ok=True) if alone else shutil.rmtree(beside, ignore_errors=True)


def _write_folder(
    folder: Path,
    to: CaptionWriter,
    samples: Sequence[_Sample],
    dataset: ClipDataset,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    linked = 0
    for done, sample in enumerate(samples, 1):
        target = folder / sample.name
        target.parent.mkdir(parents=True, exist_ok=True)
        linked += _link_or_copy(sample.path, target)
        if not to.file_name:
            _write_file(target.with_suffix(".txt"), to, [sample])
        on_progress(done, len(samples))
    if to.file_name:
        _write_file(folder / _file_name(to, samples), to, samples)
    if any(dataset.originals):
        _write_originals(folder, samples, dataset)
    notes = _how_placed(linked, len(samples) - linked)
    if any(count > 1 for count in dataset.repeats) and to.file_name:
        notes.append("How often a picture comes in an epoch is not kept: only folders of text files can say it.")
    return notes


def _link_or_copy(source: Path, target: Path) -> bool:
    """True if the picture is a hard link; another disk, a file system without them, or one in a row needs a copy."""
    if row_of(source) is not None:
        with open_bytes(source) as file:
            target.write_bytes(file.read())
        return False
    real = os.path.realpath(source)  # of a symbolic link, what it leads to
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)
        return False
    return True


def _how_placed(linked: int, copied: int) -> list[str]:
    notes = []
    if linked:
        notes.append(f"{linked} pictures are hard links: they take no room, and are the source's own files.")
    if copied:
        notes.append(f"{copied} pictures were copied.")
    return notes


def _file_name(to: CaptionWriter, samples: Sequence[_Sample]) -> str:
    """A JSON with a picture's name would be taken for that picture's own."""
    name, taken = Path(to.file_name), {os.path.splitext(sample.name)[0] for sample in samples}
    return name.name if name.stem not in taken else f"{name.stem}_of_all{name.suffix}"


def _write_originals(folder: Path, samples: Sequence[_Sample], dataset: ClipDataset) -> None:
    names, originals = {str(sample.path): sample.name for sample in samples}, dataset.absolute_originals()
    lines = [ORIGINALS_HEADER]
    for sample in samples:
        if original := originals[sample.index]:
            lines.append(f"{sample.name}\t{names.get(original, original)}")
    (folder / ORIGINALS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_file(file: Path, to: CaptionWriter, samples: Sequence[_Sample]) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(to.write([(sample.name, sample.captions) for sample in samples]))


# ---- afterwards ------------------------------------------------------------------------------------------------------


def _where(dataset: ClipDataset, place: Path, samples: Sequence[_Sample]) -> list[str]:
    if all((place.absolute().parent / sample.name).is_file() for sample in samples[:100]):
        return []
    return [f"Its names start from {dataset.folder}: it is of use where these pictures are."]


def _read_back(place: Path, to: str, samples: Sequence[_Sample]) -> None:
    found = load_dataset(place, to)
    if dict(zip(found.names, found.captions, strict=True)) != {sample.name: sample.captions for sample in samples}:
        raise UserError("What was written does not read back as it was; nothing is kept. Please report this as a bug.")
