"""Prepare a dataset: write a new one with copies, mirrored copies and crops of another one's images.

The source is never changed. `originals.tsv` records which image each new one was made from, so that copies of one image
count as correct matches of each other's captions, and a validation split keeps them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from ...errors import UserError
from .. import originals
from ..dataset import ClipDataset
from ..images.decoding import BrokenImage, decode
from ..images.image_files import file_of, open_bytes, open_image, row_of, suffix_of
from ..images.paths import relative
from ..threads import in_threads
from .detection import Box, Detector, coco_classes, load_detector, parse_classes
from .output import new_output, refuse_inside
from .variants import Preparation, crops_of, jittered, mirrored

if TYPE_CHECKING:
    from PIL import Image

LABELS = "labels.json"
RECORD = ".prepared.json"  # hidden, so that no caption reader opens it
JPEG_QUALITY = 95
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_MAX_NAME_BYTES = 200  # file systems allow 255, and suffixes such as _jitter1 are added
_EXAMPLES = 3
# Words that are wrong for a mirrored image.
_SIDES = re.compile(
    r"\b(left|right)(most|wards?|[- ]?(hand(ed)?|side|facing))?\b|\b(anti|counter)?-?clockwise\b", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared dataset: its folder, the number of its images and of their originals, the (name, reason) of each image
    that was left out, and notes. `made_before`: the folder was there already, made from the same images and settings.
    """

    folder: Path
    images: int = 0
    originals: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    made_before: bool = False


def prepare_images(
    dataset: ClipDataset,
    target: str | os.PathLike,
    settings: Preparation,
    *,
    number_if_taken: bool = False,
    detector: Detector | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Prepared:
    """Write a new dataset folder, completely or not at all.

    If `target` exists it is refused. With `number_if_taken` the folder is instead one that was made from the same
    images with the same settings, or else the next free of name_2, name_3 and so on. `detector` replaces the one that
    the settings name. Raises `UserError`.
    """
    target = Path(target)
    refuse_inside(dataset, target)
    record: dict[str, object] = {"settings": dataclasses.asdict(settings), "source": dataset.fingerprint()}
    if number_if_taken:
        target = _next_free(target, record)
        if target.exists():
            return Prepared(folder=target, made_before=True)
    elif os.path.lexists(target):
        raise UserError(f"{target} is already there; choose a name that is not taken.")
    wanted: frozenset[str] = frozenset()
    if settings.crop == "objects":
        wanted = _wanted(settings)  # checked before anything is downloaded
        detector = detector or load_detector(settings.detector, device, on_note)
    with new_output(target) as folder:
        variants = _VariantWriter(dataset, folder, settings, _one_at_a_time(detector), wanted)
        prepared = _write_dataset(variants, target, on_progress, check_cancelled)
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return prepared


def _next_free(target: Path, record: dict[str, object]) -> Path:
    """Return the first of name, name_2, name_3 and so on that does not exist, or was made with this record."""
    number, path = 1, target
    while os.path.lexists(path) and _record_in(path) != record:
        number += 1
        path = target.with_name(f"{target.name}_{number}")
    return path


def _record_in(folder: Path) -> object:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a prepared folder
        return None


def _wanted(settings: Preparation) -> frozenset[str]:
    """Return the classes of objects to cut out."""
    wanted = (parse_classes(settings.only) or frozenset(coco_classes())) - parse_classes(settings.never)
    if not wanted:
        raise UserError(f"All of only ({settings.only}) is also in never ({settings.never}); remove one of them.")
    return wanted


def _one_at_a_time(detector: Detector | None) -> Callable[[Image.Image], list[Box]]:
    """Return the detector for use in several threads: one call fills the GPU, or all CPU cores, by itself."""
    lock = threading.Lock()

    def detect(image: Image.Image) -> list[Box]:
        with lock:
            return detector(image) if detector is not None else []

    return detect


# ---- the dataset -----------------------------------------------------------------------------------------------------


def _write_dataset(
    variants: _VariantWriter,
    target: Path,
    on_progress: Callable[[int, int], None],
    check_cancelled: Callable[[], None],
) -> Prepared:
    """Write images, labels and originals of the dataset that will be at `target`."""
    dataset, settings, folder = variants.dataset, variants.settings, variants.folder
    count, left_out, used_originals = 0, [], set()
    sided = _SidedCaptions()
    with (
        open(folder / originals.NAME, "w", encoding="utf-8", newline="\n") as originals_file,
        contextlib.closing(_LabelsFile(folder / LABELS)) as labels,
        contextlib.closing(in_threads(variants.write, variants.stems(), ahead=16)) as results,
    ):
        originals_file.write(originals.HEADER + "\n")
        for done, result in enumerate(results, 1):
            check_cancelled()
            if result.reason:
                left_out.append((dataset.names[result.index], result.reason))
            for name, captions in result.files:
                originals_file.write(f"{name}\t{result.original}\n")
                labels.add(name, captions)
            if result.files:
                count += len(result.files)
                used_originals.add(result.original)
                sided.add(dataset.captions[result.index])
            on_progress(done, len(dataset))
    if not count:
        name, reason = left_out[0] if left_out else (dataset.name, "it is empty")
        raise UserError(
            f"No image could be made from {dataset.name} (for example {name}: {reason}); nothing was written."
        )
    notes = [f"{count} images were made from {len(used_originals)}."]
    if left_out:
        name, reason = left_out[0]
        notes.append(f"{len(left_out)} images were left out, for example {name}: {reason}.")
    notes += sided.notes(settings)
    if dataset.has_labels and dataset.has_captions:
        notes.append(
            f"The captions are in {LABELS}, and the folders are the classes; choose captions: folders to open the "
            "dataset by class."
        )
    return Prepared(
        folder=target,
        images=count,
        originals=len(used_originals),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


class _SidedCaptions:
    """Captions that mention a side, counted, with the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, captions: tuple[str, ...]) -> None:
        sided = [text for text in captions if _SIDES.search(text)]
        self.count += len(sided)
        self.examples += [repr(text[:80]) for text in sided[: _EXAMPLES - len(self.examples)]]

    def notes(self, settings: Preparation) -> Iterator[str]:
        examples = "; ".join(self.examples)
        if self.count and settings.flip == "all":
            yield (
                f"{self.count} captions mention a side and are wrong for the mirrored copies: {examples}. Choose flip: "
                "safe, or correct them."
            )
        elif self.count and settings.flip == "safe":
            yield f"{self.count} captions mention a side and were not given to mirrored copies: {examples}."


class _LabelsFile:
    """A labels JSON, written entry by entry; not created if no image has a caption."""

    def __init__(self, path: Path):
        self.path = path
        self.stream: TextIO | None = None

    def add(self, name: str, captions: tuple[str, ...]) -> None:
        if not captions:
            return
        separator = ","
        if self.stream is None:
            self.stream, separator = open(self.path, "w", encoding="utf-8", newline="\n"), "{"
        entry = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(list(captions), ensure_ascii=False)}"
        self.stream.write(f"{separator}\n {entry}")

    def close(self) -> None:
        if self.stream is not None:
            with self.stream:
                self.stream.write("\n}\n")


# ---- the images ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Written:
    """The files made from one sample with their captions, or the reason why there are none."""

    index: int
    original: str  # relative to the new folder
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    reason: str = ""


class _VariantWriter:
    """Writes the variants of each sample's image into a folder, under names of which no two are the same."""

    def __init__(
        self,
        dataset: ClipDataset,
        folder: Path,
        settings: Preparation,
        detect: Callable[[Image.Image], list[Box]],
        wanted: frozenset[str],
    ):
        self.dataset, self.folder, self.settings = dataset, folder, settings
        self.detect, self.wanted = detect, wanted
        self._names = _UniqueNames()

    def stems(self) -> Iterator[tuple[int, str]]:
        """Yield each sample with the beginning of its variants' names: folders, and the file name without extension."""
        names = _UniqueNames()
        for index in range(len(self.dataset)):
            suffix = self._suffix(index)
            unique = names.take(_safe_stem(self._name(index)), suffix)
            yield index, unique.removesuffix(suffix)

    def write(self, item: tuple[int, str]) -> _Written:
        index, stem = item
        captions = self.dataset.captions[index]
        original = relative(os.path.abspath(self.dataset.original(index)), str(self.folder))
        try:
            image = decode(self.dataset.path(index))
        except BrokenImage as error:
            return _Written(index, original, reason=str(error))
        if _breaks_table(original):
            return _Written(index, original, reason="its name contains a tab or line break; rename it")
        crops = crops_of(image, self.settings, self.detect, self.wanted)
        if not crops:
            return _Written(index, original, reason="no object was found in it")
        files = []
        for crop in crops:
            base = stem + crop.suffix
            cropped = image if crop.square is None else image.crop(crop.square)
            files.append((self._save(cropped, index, base, is_whole=crop.square is None), captions))
            for number in range(1, self.settings.jitter_copies + 1):
                copy = jittered(cropped, self.settings, f"{base}/{number}")
                files.append((self._save(copy, index, f"{base}_jitter{number}"), captions))
            if (mirrored_captions := self._mirrored_captions(captions)) is not None:
                files.append((self._save(mirrored(cropped), index, f"{base}_mirrored"), mirrored_captions))
        return _Written(index, original, tuple(files))

    def _mirrored_captions(self, captions: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the captions of a mirrored copy, or None if there is to be no copy."""
        if self.settings.flip == "safe":
            safe = tuple(text for text in captions if not _SIDES.search(text))
            return safe if safe or not captions else None
        return captions if self.settings.flip == "all" else None

    def _save(self, image: Image.Image, index: int, stem: str, *, is_whole: bool = False) -> str:
        """Write one image and return its name. JPEGs stay JPEGs, the rest becomes PNG.

        A whole image that is upright already is copied byte by byte.
        """
        source, suffix = self.dataset.path(index), self._suffix(index)
        copy = is_whole and _is_upright(source)
        name = self._names.take(stem, suffix_of(source) if copy else suffix)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            with open_bytes(source) as file, open(path, "wb") as output:
                shutil.copyfileobj(file, output)
            return name
        encoded = io.BytesIO()  # written below: Pillow's own errors do not say that the disk is full
        if suffix == ".png":
            image.save(encoded, "PNG")
        else:
            image.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        path.write_bytes(encoded.getbuffer())
        return name

    def _suffix(self, index: int) -> str:
        """Return the extension of variants that are encoded again: that of a JPEG, or .png."""
        suffix = os.path.splitext(self.dataset.names[index])[1].lower()
        return suffix if suffix in _JPEG_SUFFIXES else ".png"

    def _name(self, index: int) -> str:
        """Return a sample's path in the new folder: in the folder of its class, or else as in the source."""
        name = os.path.normpath(self.dataset.names[index].replace("\\", "/")).replace(os.sep, "/")
        if (row := row_of(name)) is not None:
            name = f"{os.path.splitext(file_of(name))[0]}_{row:06}"
        parts = [part for part in name.split("/") if part not in ("", "..") and not part.endswith(":")]
        label = self.dataset.labels[index]
        if label is None:
            return "/".join(parts)
        class_name = self.dataset.class_names[label]
        if len(parts) == 2 and parts[0].replace("_", " ") == class_name:
            return "/".join(parts)
        return f"{class_name.replace('/', '_')}/{parts[-1]}"


class _UniqueNames:
    """Names of which no two are the same, even where upper and lower case are the same. Safe to use from threads."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._lock = threading.Lock()

    def take(self, stem: str, suffix: str) -> str:
        with self._lock:
            number, name = 1, stem + suffix
            while name.casefold() in self._taken:
                number += 1
                name = f"{stem}_{number}{suffix}"
            self._taken.add(name.casefold())
            return name


def _safe_stem(name: str) -> str:
    """Return a name without extension, with characters replaced that some file systems, or a table, cannot hold."""
    folder, _, file = name.rpartition("/")
    stem = _safe(os.path.splitext(file)[0]).encode("utf-8", "replace")[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
    stem = stem.lstrip(".") or "image"
    return f"{_safe(folder)}/{stem}" if folder else stem


def _safe(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in '\\:*?"<>|' else "_" for letter in text)


def _is_upright(path: Path) -> bool:
    """Return whether an image's EXIF asks for no rotation."""
    from PIL import ExifTags

    with open_image(path) as opened:
        return opened.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _breaks_table(text: str) -> bool:
    return len(text.splitlines()) != 1 or "\t" in text
