"""Class folders: each subfolder is a class of the images in it."""

from __future__ import annotations

from ..images.folder_tree import Tree, joined
from .parsed import ParsedCaptions

# Folders of these names, with or without a year, are parts of a split and not classes.
_SPLIT_NAMES = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))


def read_class_folders(tree: Tree) -> ParsedCaptions | str:
    folders = list(dict.fromkeys(folder for folder, _ in tree.images))
    depths = {folder.count("/") + 1 if folder else 0 for folder in folders}
    top_folders = list(dict.fromkeys(folder.split("/")[0] for folder in folders))
    only_splits = all(folder.lower().rstrip("0123456789") in _SPLIT_NAMES for folder in top_folders)
    if depths == {2} or (depths == {1} and only_splits):
        example = tree.top / top_folders[0]
        return f"the folders {', '.join(top_folders[:4])} in it are parts; choose one of them, such as {example}"
    if depths != {1} or [folder.lower() for folder in top_folders] == ["images"]:
        return ""
    return ParsedCaptions(
        format="folders",
        reason="each subfolder is a class of images",
        names=[joined(folder, name) for folder, name in tree.images],
        captions=[""] * len(tree.images),
        classes=[folder.replace("_", " ") for folder, _ in tree.images],
        origins=[str(tree.top)] * len(tree.images),
    )
