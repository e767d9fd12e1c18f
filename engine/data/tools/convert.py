"""Write a dataset's captions in another format, with its images, so that the result opens as a dataset."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError
from ..dataset import ClipDataset
from ..images.image_files import BrokenImage, file_of, open_bytes, row_of, suffix_of
from ..load import load_dataset
from ..originals import HEADER as ORIGINALS_HEADER
from ..originals import NAME as ORIGINALS
from ..readers.registry import WRITERS, CaptionWriter
from .output import new_output, refuse_inside


@dataclasses.dataclass(frozen=True)
class _Sample:
    """An image file, its name in the output, and its captions."""

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
    """Write a dataset's captions in one of `WRITERS`, and return notes on what was done.

    `out` is a new folder, which gets the images too, as hard links where possible; or a new file (.json, .jsonl or
    .csv), which gets the captions alone. The source does not change. What was written is read back and compared before
    it is moved to `out`. Raises `UserError`.
    """
    path = Path(out)
    if to not in WRITERS:
        raise UserError(f"Captions cannot be written as {to!r}; choose {', '.join(WRITERS)}.")
    format = WRITERS[to]
    is_file = bool(format.file_name) and path.suffix.lower() == Path(format.file_name).suffix
    if os.path.lexists(path) and (is_file or not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is already there; choose a name that is not taken.")
    refuse_inside(dataset, path)
    top = path.absolute().parent if is_file else None
    samples, notes = _samples(dataset, top, unique_stems=not format.file_name)
    with new_output(path, is_file=is_file) as part:
        if top is not None:
            _write_captions(part, format, samples)
            if not all((top / sample.name).is_file() for sample in samples[:100]):
                notes.append(f"Its image names are relative to {dataset.folder}; move it there to use it.")
        else:
            notes += _write_folder(part, format, samples, dataset, on_progress)
        _check(part, to, samples)
    captions = sum(len(sample.captions) for sample in samples)
    return [f"Wrote {captions} captions of {len(samples)} images to {path}.", *notes]


def _samples(dataset: ClipDataset, top: Path | None, *, unique_stems: bool) -> tuple[list[_Sample], list[str]]:
    """Return what to write, and notes.

    Names are relative to `top`, the folder of a new caption file, where images lie below it, else to the dataset's
    folder. Without `top` images are written too, so that missing ones are left out.
    """
    missing, taken, samples = set(dataset.missing()), set[str](), []
    for index in range(len(dataset)):
        if index in missing and top is None:
            continue
        path = dataset.path(index)
        if row_of(path) is not None and top is not None:
            raise UserError(
                f"{dataset.name} has its images inside Parquet files, where other programs do not find them. Give a "
                "new folder instead of a file; it gets the images too."
            )
        try:
            name = _unique(_name(dataset, path, top), taken, unique_stems)
        except BrokenImage:  # a row without an image
            missing.add(index)
            continue
        samples.append(_Sample(path, name, dataset.training_captions(index), index))
    if not samples:
        raise UserError(f"All images that the captions of {dataset.folder} name are missing; nothing was written.")
    notes = [f"{len(missing)} images are missing and are left out."] if missing and top is None else []
    if dataset.has_labels:
        notes.append(f"Classes are written as captions, such as {samples[0].captions[0]!r}.")
    return samples, notes


def _name(dataset: ClipDataset, path: Path, top: Path | None) -> str:
    tops = [*([top] if top else []), dataset.folder, *map(Path, dataset.roots)]
    start = next((folder for folder in tops if path.is_relative_to(folder)), path.parent)
    if (row := row_of(path)) is not None:
        file = Path(file_of(str(path)))
        return f"{file.relative_to(start).with_suffix('').as_posix()}_{row:06}{suffix_of(path)}"
    return path.relative_to(start).as_posix()


def _unique(name: str, taken: set[str], unique_stems: bool) -> str:
    """Return the name, with a number if another sample has it; for sidecars, if it would share its text file."""
    stem, suffix = os.path.splitext(name)
    numbered, number = name, 1
    while (key := os.path.splitext(numbered)[0] if unique_stems else numbered) in taken:
        number += 1
        numbered = f"{stem}_{number}{suffix}"
    taken.add(key)
    return numbered


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_folder(
    folder: Path,
    format: CaptionWriter,
    samples: Sequence[_Sample],
    dataset: ClipDataset,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """Write images and captions, and return notes."""
    linked = 0
    for done, sample in enumerate(samples, 1):
        image = folder / sample.name
        image.parent.mkdir(parents=True, exist_ok=True)
        linked += _link_or_copy(sample.path, image)
        if not format.file_name:
            _write_captions(image.with_suffix(".txt"), format, [sample])
        on_progress(done, len(samples))
    if format.file_name:
        _write_captions(folder / _caption_file_name(format, samples), format, samples)
    if any(dataset.originals):
        _write_originals(folder, samples, dataset)
    notes = []
    if linked:
        notes.append(f"{linked} images are hard links: they are the source's own files and take no extra space.")
    if linked < len(samples):
        notes.append(f"{len(samples) - linked} images were copied.")
    if any(count > 1 for count in dataset.repeats) and format.file_name:
        notes.append("The repeats of images are lost: only folders with a text file per image can express them.")
    return notes


def _link_or_copy(source: Path, target: Path) -> bool:
    """Return whether the image became a hard link. Across disks, and for rows of a file, it is a copy."""
    if row_of(source) is not None:
        with open_bytes(source) as file:
            target.write_bytes(file.read())
        return False
    real = os.path.realpath(source)  # link to the file itself, not to a symbolic link
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)
        return False
    return True


def _caption_file_name(format: CaptionWriter, samples: Sequence[_Sample]) -> str:
    """Return a name that no image shares: a JSON beside an image of its name would be read as that image's own."""
    name, stems = Path(format.file_name), {os.path.splitext(sample.name)[0] for sample in samples}
    return name.name if name.stem not in stems else f"{name.stem}_of_all{name.suffix}"


def _write_originals(folder: Path, samples: Sequence[_Sample], dataset: ClipDataset) -> None:
    names, originals = {str(sample.path): sample.name for sample in samples}, dataset.absolute_originals()
    lines = [ORIGINALS_HEADER]
    for sample in samples:
        if original := originals[sample.index]:
            lines.append(f"{sample.name}\t{names.get(original, original)}")
    (folder / ORIGINALS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_captions(file: Path, format: CaptionWriter, samples: Sequence[_Sample]) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(format.write([(sample.name, sample.captions) for sample in samples]))


def _check(path: Path, to: str, samples: Sequence[_Sample]) -> None:
    written = load_dataset(path, to)
    if dict(zip(written.names, written.captions, strict=True)) != {item.name: item.captions for item in samples}:
        raise UserError(
            "The written captions do not read back as they should, so they were removed. Please report this bug."
        )
