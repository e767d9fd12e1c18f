"""ClipDataset, a dataset as a value: image names, captions and labels by index. Images are opened later."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .fingerprint import fingerprint_of
from .images.locations import ImageLocations
from .images.paths import relative
from .readers.parsed import Captions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ClipDataset:
    """Samples by index: an image's name as written, its captions, and its class as an index into `class_names`.

    `len` counts samples, whether or not their images are there. `format` and `reason` say how the captions were read,
    `notes` are sentences for the user. `origins` are the folders that names start from, `roots` those that no image may
    be outside of; where they are empty, `folder` is both. `originals` name, from `folder`, the image that each one is a
    copy of ("" for none); it need not be there. `repeats` are how often each sample comes per epoch; once, if empty.
    `other_parts` are what was split off: their images are in the same folders but no samples of this dataset.
    """

    name: str
    folder: Path
    format: str
    reason: str
    names: Sequence[str]
    captions: Sequence[tuple[str, ...]]
    labels: Sequence[int | None]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origins: Sequence[str] = ()
    roots: tuple[str, ...] = ()
    originals: Sequence[str] = ()
    repeats: Sequence[int] = ()
    other_parts: tuple[ClipDataset, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_captions(self) -> bool:
        return any(self.captions)

    @property
    def has_labels(self) -> bool:
        return bool(self.class_names)

    @property
    def is_whole_folder(self) -> bool:
        """Whether the dataset is one folder, rather than a caption file in one or several folders."""
        return tuple(self.roots) in ((), (str(self.folder),))

    def training_captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; one that has only a class gets "a photo of a …."."""
        label = self.labels[index]
        return self.captions[index] or (() if label is None else (f"a photo of a {self.class_names[label]}.",))

    def subset(self, indices: Sequence[int]) -> ClipDataset:
        def select(column: Sequence[T]) -> Sequence[T]:
            return [column[index] for index in indices] if column else ()

        captions = self.captions
        return dataclasses.replace(
            self,
            names=select(self.names),
            captions=captions.select(indices) if isinstance(captions, Captions) else select(captions),
            labels=select(self.labels),
            origins=select(self.origins),
            originals=select(self.originals),
            repeats=select(self.repeats),
        )

    # ---- where the images are ----------------------------------------------------------------------------------------

    @functools.cached_property
    def locations(self) -> ImageLocations:
        return ImageLocations(str(self.folder), self.names, self.origins, self.roots)

    def path(self, index: int) -> Path:
        """The image of a sample. A missing one gets the first path that it was looked for at; a name that leads out of
        the dataset is never followed."""
        return self.locations.path(index)

    def missing(self) -> list[int]:
        """Samples whose image is not there. Folders are listed, images are not touched."""
        return self.locations.missing()

    def original(self, index: int) -> str:
        """The path of the image that this one is a copy of, or its own: equal for all copies of one image."""
        original = self.originals[index] if self.originals else ""
        return os.path.normpath(os.path.join(self.folder, original)) if original else str(self.path(index))

    def with_originals(self, originals: Mapping[str, str]) -> ClipDataset:
        """Note which images are copies; `originals` maps absolute paths of copies to those of their originals."""

        def original(index: int) -> str:
            copies = (path for path in self.locations.candidates(index) if path in originals)
            path = next(copies, None)
            return "" if path is None else relative(originals[path], str(self.folder))

        return dataclasses.replace(self, originals=[original(index) for index in range(len(self))])

    def absolute_originals(self) -> list[str]:
        """The column `originals` as absolute paths ("" for none), for a dataset with another folder."""
        if not self.originals:
            return [""] * len(self)
        return [name and os.path.normpath(os.path.join(self.folder, name)) for name in self.originals]

    @functools.cached_property
    def _fingerprint(self) -> str:
        columns = (self.captions, self.labels, self.class_names, self.originals, self.repeats)
        return fingerprint_of(self.locations, *columns)

    def fingerprint(self) -> str:
        """A hash that changes with the columns and the image files; computed once. See `fingerprint_of`."""
        return self._fingerprint
