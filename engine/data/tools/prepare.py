"""A new data set out of another: colour-jittered and mirrored copies, centre squares, squares around objects.

The source is never touched. Each picture's origin goes into `originals.tsv`, so that copies of one picture are right
answers for each other's captions and stay on one side of a validation split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...errors import UserError
from .. import originals
from ..dataset import ClipDataset
from ..images.decoding import BrokenImage, decode
from ..images.image_files import file_of, open_bytes, open_image, row_of, suffix_of
from ..threads import in_threads
from .crops import jittered, mirror, parts_of
from .detection import Detector, coco_classes, load_detector, parse_classes
from .prepare_settings import ALL, OBJECTS, SAFE, Preparation
from .prepared_names import NewNames

LABELS = "labels.json"
RECORD = ".prepared.json"  # hidden, so that no reader of captions opens it
JPEG_QUALITY = 95
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_EXAMPLES = 3
# Words that are wrong of a mirrored picture.
_SIDES = re.compile(
    r"\b(left|right)(most|wards?|[- ]?(hand(ed)?|side|facing))?\b|\b(anti|counter)?-?clockwise\b", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The new folder; how many pictures are in it, and of how many originals; pictures that were left out, with the
    reason; sentences for the user. `made_before`: the folder was there already, made of the same pictures alike."""

    folder: Path
    pictures: int = 0
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
    """Write a new data set to `target`, whole or not at all; it opens with `load_dataset`.

    A `target` that exists is refused; with `number_if_taken` the next free name (name_2, name_3, …) is taken, or the
    folder that was made of the same pictures with the same settings. `detector` replaces the one of the settings.
    Raises `UserError`.
    """
    target = Path(target)
    _refuse_inside(dataset, target)
    record = {"settings": dataclasses.asdict(settings), "source": dataset.fingerprint()}
    if number_if_taken:
        target = _next_free(target, record)
        if target.exists():
            return Prepared(folder=target, made_before=True)
    elif os.path.lexists(target):
        raise UserError(f"{target} is already there; choose a name that is not taken.")
    wanted = _wanted(settings) if settings.crop == OBJECTS else frozenset()  # checked before anything is downloaded
    if settings.crop == OBJECTS and detector is None:
        detector = load_detector(settings.detector, device, on_note)
    with _new_folder(target) as beside:
        maker = _Maker(dataset, beside, target, settings, detector, wanted)
        prepared = maker.run(on_progress, check_cancelled)
        (beside / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return dataclasses.replace(prepared, folder=target)


def _next_free(target: Path, record: dict) -> Path:
    """The first of name, name_2, name_3, … that does not exist, or holds what would be written there."""
    number, place = 1, target
    while os.path.lexists(place) and _recorded(place) != record:
        number += 1
        place = target.with_name(f"{target.name}_{number}")
    return place


def _recorded(folder: Path) -> dict | None:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a folder that was prepared
        return None


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, moved there in the end; gone if something is raised."""
    place = target.absolute()
    beside = place.with_name(f".{secrets.token_hex(4)}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        os.rename(beside, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: {target} could not be written and nothing of it is left; free some space and try "
                "again."
            ) from error
        reason = error.strerror or error
        raise UserError(f"{target} could not be written ({reason}); choose another place.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _wanted(settings: Preparation) -> frozenset[str]:
    """The classes of objects that squares are cut around."""
    wanted = (parse_classes(settings.only) or frozenset(coco_classes())) - parse_classes(settings.never)
    if not wanted:
        raise UserError(f"All of only ({settings.only}) is also in never ({settings.never}); take one of them out.")
    return wanted


def _refuse_inside(dataset: ClipDataset, target: Path) -> None:
    """Nothing is written into the source; what lies beside a single caption file is not all of it."""
    whole = tuple(dataset.roots) in ((), (str(dataset.folder),))
    if whole and target.resolve().is_relative_to(dataset.folder.resolve()):
        raise UserError(f"{target} is inside {dataset.folder}, which stays as it is; choose a place outside of it.")


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Made:
    """What became of one sample: the names of the new pictures with their captions, or why there is none."""

    index: int
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    reason: str = ""


class _Maker:
    """Writes all pictures of one data set into the folder `beside`, which will be `target`."""

    def __init__(
        self,
        dataset: ClipDataset,
        beside: Path,
        target: Path,
        settings: Preparation,
        detector: Detector | None,
        wanted: frozenset[str],
    ):
        self.dataset, self.beside, self.target, self.settings = dataset, beside, target, settings
        self.detector, self.detecting = detector, threading.Lock()
        self.wanted = wanted
        self.names = NewNames()

    def run(self, on_progress: Callable[[int, int], None], check_cancelled: Callable[[], None]) -> Prepared:
        made, left_out, found_in, sided = 0, [], set(), _Sided()
        count = len(self.dataset)
        plan = ((index, self.names.stem(self._name(index), self._suffix(index))) for index in range(count))
        with (
            open(self.beside / originals.NAME, "w", encoding="utf-8", newline="\n") as origins,
            contextlib.closing(_Labels(self.beside / LABELS)) as labels,
            contextlib.closing(in_threads(lambda job: self._make(*job), plan, ahead=16)) as results,
        ):
            origins.write(originals.HEADER + "\n")
            for done, result in enumerate(results, 1):
                check_cancelled()
                if result.reason:
                    left_out.append((self.dataset.names[result.index], result.reason))
                original = self._original(result.index)
                for name, captions in result.files:
                    origins.write(f"{name}\t{original}\n")
                    labels.add(name, captions)
                if result.files:
                    made += len(result.files)
                    found_in.add(original)
                    sided.note(self.dataset.captions[result.index])
                on_progress(done, count)
        if not made:
            raise UserError(_none_made(self.dataset, left_out))
        return Prepared(
            folder=self.target,
            pictures=made,
            originals=len(found_in),
            left_out=tuple(left_out),
            notes=tuple(self._notes(made, len(found_in), left_out, sided)),
        )

    def _make(self, index: int, stem: str) -> _Made:
        """Write the pictures of one sample."""
        try:
            picture = decode(self.dataset.path(index))
        except BrokenImage as error:
            return _Made(index, reason=str(error))
        if _breaks_lines(self._original(index)):
            return _Made(index, reason="its name holds a line break, which originals.tsv cannot hold; rename it")
        parts = parts_of(picture, self.settings, self._detect, self.wanted)
        if not parts:
            return _Made(index, reason="no object was found in it")
        captions = self.dataset.captions[index]
        safe = tuple(text for text in captions if not _SIDES.search(text))
        files = []
        for part in parts:
            whole = picture if part.square is None else picture.crop(part.square)
            files.append((self._save(whole, index, stem + part.suffix, verbatim=part.square is None), captions))
            for number in range(1, self.settings.jitter_copies + 1):
                copy = jittered(whole, self.settings, f"{stem}{part.suffix}/{number}")
                files.append((self._save(copy, index, f"{stem}{part.suffix}_jitter{number}"), captions))
            if self._mirrors(captions, safe):
                mirrored = safe if self.settings.flip == SAFE else captions
                files.append((self._save(mirror(whole), index, f"{stem}{part.suffix}_mirrored"), mirrored))
        return _Made(index, tuple(files))

    def _detect(self, picture):
        with self.detecting:  # one at a time: a detector fills the device, or all cores, by itself
            return self.detector(picture)

    def _mirrors(self, captions: tuple[str, ...], safe: tuple[str, ...]) -> bool:
        if self.settings.flip == SAFE:
            return bool(safe) or not captions
        return self.settings.flip == ALL

    def _save(self, picture, index: int, stem: str, *, verbatim: bool = False) -> str:
        """Write one picture and return its name from the new folder. JPEGs stay JPEGs, all else becomes PNG; a whole
        picture that stands upright is copied byte by byte."""
        path, suffix = self.dataset.path(index), self._suffix(index)
        whole = verbatim and _stands_upright(path)
        name = self.names.file(stem, suffix_of(path) if whole else suffix)
        place = self.beside / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if whole:
            with open_bytes(path) as source, open(place, "wb") as target:
                shutil.copyfileobj(source, target)
            return name
        encoded = io.BytesIO()  # Pillow itself does not tell a full disk from other failures
        if suffix == ".png":
            picture.save(encoded, "PNG")
        else:
            picture.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        place.write_bytes(encoded.getbuffer())
        return name

    def _suffix(self, index: int) -> str:
        """Of what is encoded anew: that of a JPEG, else .png."""
        suffix = os.path.splitext(self.dataset.names[index])[1].lower()
        return suffix if suffix in _JPEG_SUFFIXES else ".png"

    def _name(self, index: int) -> str:
        """Where the new picture lies in the new folder: in that of its class, else as in the source."""
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

    def _original(self, index: int) -> str:
        """The path of the picture that a sample was made from in the first place, from the new folder."""
        original = os.path.abspath(self.dataset.original(index))
        try:
            return os.path.relpath(original, self.target.absolute()).replace(os.sep, "/")
        except ValueError:  # on another drive of Windows
            return original.replace(os.sep, "/")

    # ---- words -----------------------------------------------------------------------------------------------------

    def _notes(self, made: int, from_originals: int, left_out: list[tuple[str, str]], sided: _Sided) -> Iterator[str]:
        yield f"{made} pictures were made from {from_originals}."
        if left_out:
            name, reason = left_out[0]
            yield f"{len(left_out)} pictures were left out, for example {name}: {reason}."
        if sided.count and self.settings.flip == ALL:
            yield (
                f"{sided.count} captions name a side and are wrong of the mirrored copies: {sided.examples}. Choose "
                f"flip: {SAFE}, or correct them."
            )
        elif sided.count and self.settings.flip == SAFE:
            yield f"{sided.count} captions name a side and were not given to mirrored copies: {sided.examples}."
        if self.dataset.has_labels and self.dataset.has_captions:
            yield (
                f"The captions are in {LABELS}, the classes are the folders: choose captions: folders to open them by "
                "class."
            )


class _Labels:
    """labels.json, written as it goes; no such file where no picture has a caption."""

    def __init__(self, file: Path):
        self.file, self.stream = file, None

    def add(self, name: str, captions: tuple[str, ...]) -> None:
        if not captions:
            return
        if self.stream is None:
            self.stream = open(self.file, "w", encoding="utf-8", newline="\n")
        start = "{" if self.stream.tell() == 0 else ","
        entry = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(list(captions), ensure_ascii=False)}"
        self.stream.write(f"{start}\n {entry}")

    def close(self) -> None:
        if self.stream is not None:
            with self.stream:
                self.stream.write("\n}\n")


class _Sided:
    """Captions that name a side, counted, with the first few."""

    def __init__(self):
        self.count, self.first = 0, []

    def note(self, captions: tuple[str, ...]) -> None:
        for text in captions:
            if _SIDES.search(text):
                self.count += 1
                if len(self.first) < _EXAMPLES:
                    self.first.append(text[:80])

    @property
    def examples(self) -> str:
        return "; ".join(repr(text) for text in self.first)


def _none_made(dataset: ClipDataset, left_out: list[tuple[str, str]]) -> str:
    name, reason = left_out[0] if left_out else (dataset.name, "it is empty")
    return f"Of {dataset.name} no picture could be made (for example {name}: {reason}); nothing was written."


def _stands_upright(path: Path) -> bool:
    """Whether a picture's file says nothing of turning it."""
    from PIL import ExifTags

    with open_image(path) as opened:
        return opened.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _breaks_lines(text: str) -> bool:
    return len(text.splitlines()) != 1 or "\t" in text
