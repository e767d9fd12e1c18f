"""Where the images are that a dataset names: beside their caption file, in `images` beside it, or in the dataset's own
folders, and never outside of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .image_files import file_of
from .paths import files_in, inside, starts


@dataclasses.dataclass(frozen=True)
class ImageLocations:
    """Image names as written, the folder that each starts from (`origins`), and the folders that all images must be in
    (`roots`). Where they are empty, `folder` is both."""

    folder: str
    names: Sequence[str]
    origins: Sequence[str]
    roots: tuple[str, ...]

    def path(self, index: int) -> Path:
        """The first candidate that is a file; if none is, the first."""
        candidates = list(self.candidates(index))
        return Path(next((path for path in candidates if os.path.isfile(file_of(path))), candidates[0]))

    def candidates(self, index: int) -> Iterator[str]:
        """Absolute paths that the image may have, the likeliest first; at least one."""
        name = self.names[index].replace("\\", "/")  # as Windows writes it
        origin = self.origins[index] if self.origins else self.folder
        outside = True
        for start in starts(origin, self._roots):
            path = os.path.normpath(os.path.join(start, name))
            if inside(path, self._roots):
                outside = False
                yield path
        if outside:
            # No file is ever called this, so a name that leads out of the dataset is a missing image.
            yield os.path.join(self.folder, "\N{REPLACEMENT CHARACTER} outside the dataset", "none")

    def candidate_folders(self, origin: str, folder: str) -> list[str]:
        """Where the images may be whose names start with `folder`, the likeliest first."""
        folders = (os.path.normpath(os.path.join(start, folder)) for start in starts(origin, self._roots))
        return [path for path in folders if inside(os.path.join(path, ""), self._roots)]

    @property
    def _roots(self) -> tuple[str, ...]:
        return self.roots or (self.folder,)

    def split_names(self) -> Iterator[tuple[str, str, str | None]]:
        """Yield (origin, folder in the name, file) of each image. The file is None for a name that cannot be split,
        because its folder alone does not lead to it: a/.., say, or /a."""
        windows = os.name == "nt"
        for origin, name in zip(self.origins or itertools.repeat(self.folder), self.names, strict=False):
            folder, slash, file = name.replace("\\", "/").rpartition("/")
            odd = file in ("", ".", "..") or (slash and not folder) or (windows and ":" in file)
            yield origin, folder, None if odd else file

    def missing(self) -> list[int]:
        """Indices of images that are not there. Lists folders, once each, instead of asking for a million files."""
        listing = functools.cache(files_in)
        files_by_folder: dict[tuple[str, str], frozenset[str]] = {}  # of all folders that a name may lead to
        missing = []
        for index, (origin, folder, file) in enumerate(self.split_names()):
            if file is None:
                if not any(os.path.isfile(file_of(path)) for path in self.candidates(index)):
                    missing.append(index)
                continue
            files = files_by_folder.get((origin, folder))
            if files is None:
                some = [files for path in self.candidate_folders(origin, folder) if (files := listing(path))]
                # Nearly always one folder has files: its set is shared, not copied for every name.
                files = files_by_folder[origin, folder] = some[0] if len(some) == 1 else frozenset().union(*some)
            if (file_of(file) if "#" in file else file) not in files:
                missing.append(index)
        return missing
