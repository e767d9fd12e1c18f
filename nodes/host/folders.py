"""ComfyUI's folders: the files and folders that widgets list, the paths behind them, and the paths that nodes write to.

A name from a widget is looked up in the list as it is now, whatever the widget once offered: no other file is opened.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import folder_paths

from ...engine.clip.tensor_files import INDEX_SUFFIX
from ...engine.data.images.folder_tree import walk
from ...engine.data.readers.sidecars import holds_captioned_images
from ...engine.errors import UserError

PRETRAINED = (
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
    "ViT-B-16/openai",
    "ViT-B-32/openai",
    "RN50/openai",
    "ViT-bigG-14/laion2b_s39b_b160k",
)
_PRETRAINED_PREFIX = "pretrained: "
_MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_CAPTION_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".caption")
_RUNS = "clip_finetune"
_MAX_FINGERPRINTED_FILES = 50_000
_MAX_SEARCHED_OUTPUT_FOLDERS = 1000  # they are opened each time the page asks for the list


def register_folders() -> None:
    """Register models/full_clip, output/full_clip and output/clip_vision, and datasets where ComfyUI lacks it."""
    output = folder_paths.get_output_directory()
    folder_paths.add_model_folder_path("full_clip", os.path.join(folder_paths.models_dir, "full_clip"))
    folder_paths.add_model_folder_path("full_clip", os.path.join(output, "full_clip"))
    folder_paths.add_model_folder_path("clip_vision", os.path.join(output, "clip_vision"))
    if "datasets" not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path("datasets", os.path.join(folder_paths.base_path, "datasets"))


# ---- models ----------------------------------------------------------------------------------------------------------


def list_models() -> list[str]:
    """Return the files in the model folders, the best models of runs, and the models that can be downloaded."""
    files = [name for name in folder_paths.get_filename_list("full_clip") if _is_model(name)]
    output = Path(folder_paths.get_output_directory())
    runs = sorted(path.relative_to(output).as_posix() for path in (output / _RUNS).glob("*/best.safetensors"))
    return [*files, *runs, *(_PRETRAINED_PREFIX + name for name in PRETRAINED)]


def _is_model(name: str) -> bool:
    """Return whether a file is a model or the index of a sharded one; the shards themselves are not listed."""
    name = name.lower()
    return name.endswith(INDEX_SUFFIX) or name.endswith(_MODEL_SUFFIXES) and not _SHARD.search(name)


def find_model(name: str) -> str:
    """Return the path or hub name of an entry of `list_models`. Raises `UserError` if it is not listed now."""
    if name not in list_models():
        raise UserError(f"{name!r} is not among the full CLIP models; press R to refresh the list and choose again.")
    if name.startswith(_PRETRAINED_PREFIX):
        return name.removeprefix(_PRETRAINED_PREFIX)
    if name.startswith(f"{_RUNS}/") and name.endswith("/best.safetensors"):
        return os.path.join(folder_paths.get_output_directory(), name)
    return folder_paths.get_full_path_or_raise("full_clip", name)


# ---- datasets --------------------------------------------------------------------------------------------------------


def _dataset_folders() -> dict[str, str]:
    """Return the path of each dataset folder by its name in the list.

    These are the folders in the datasets roots (two levels deep) and in the input folder, and those in the output
    folder (two levels deep) that hold captioned images. A name that is taken gets its root in front: output/my_images.
    """
    folders = [("datasets", root, _subfolders(root, 2)) for root in folder_paths.get_folder_paths("datasets")]
    folders.append(("input", folder_paths.get_input_directory(), _subfolders(folder_paths.get_input_directory(), 1)))
    folders.append(("output", folder_paths.get_output_directory(), _captioned_output_folders()))
    paths: dict[str, str] = {}
    for kind, root, names in folders:
        for name in names:
            paths.setdefault(f"{kind}/{name}" if name in paths else name, os.path.join(root, name))
    return paths


def _captioned_output_folders() -> list[str]:
    root = folder_paths.get_output_directory()
    names = [name for name in _subfolders(root, 2) if name.split("/")[0] != _RUNS]
    return [name for name in names[:_MAX_SEARCHED_OUTPUT_FOLDERS] if holds_captioned_images(os.path.join(root, name))]


def _subfolders(root: str, depth: int) -> list[str]:
    """Return the folders below `root`, down to `depth` levels, by their paths from it; hidden ones are left out.

    A link is listed like a folder, but what lies in a real folder is listed once.
    """
    folders = []
    for folder, names, _ in walk(root):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != root else ""
        names[:] = sorted(name for name in names if not name.startswith("."))
        folders += [prefix + name for name in names]
        if prefix.count("/") + 1 >= depth:
            names.clear()
    return sorted(folders, key=lambda name: name.split("/"))


def list_datasets() -> list[str]:
    return list(_dataset_folders())


def find_dataset(name: str) -> Path:
    """Return the path of an entry of `list_datasets`. Raises `UserError` if it is not listed now."""
    paths = _dataset_folders()
    if name not in paths:
        raise UserError(
            f"{name!r} is not among the dataset folders. Put your images into a folder inside ComfyUI's datasets or "
            "input folder (or output, if captions are beside them), press R to refresh the list, and choose it."
        )
    return Path(paths[name])


def dataset_path(name: str) -> Path:
    """Return the path of a folder in the first datasets root, whether it exists or not."""
    plain = re.sub(r'[/\\:*?"<>|\0]+', "_", name).strip(" .") or "dataset"
    return Path(folder_paths.get_folder_paths("datasets")[0], plain)


def new_dataset_path(name: str) -> Path:
    """Return the first of name, name_2, name_3, … in the first datasets root that does not exist."""
    path = dataset_path(name)
    paths = (path if number == 1 else path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def graph_images_folder() -> Path:
    """Return the folder for images that come from other nodes; ComfyUI empties its temp folder when it starts."""
    return Path(folder_paths.get_temp_directory(), "clip_finetune_images")


# ---- fingerprints: equal as long as the files are --------------------------------------------------------------------


def file_fingerprint(path: str | Path) -> tuple[str | int, ...]:
    """Return a value that changes with the file's size or time. ComfyUI wants plain values here, not a `Path`."""
    if not os.path.isfile(path):
        return (str(path),)
    stat = os.stat(path)
    return (str(path), stat.st_size, stat.st_mtime_ns)


def folder_fingerprint(folder: str | Path) -> list[tuple[str | int, ...]]:
    """Return a value that changes when a file in the folder does.

    Of more than 50,000 files only the caption files and the folders' times are compared (the node's help says so).
    """
    folder = str(folder)
    files: list[str] = []
    light: list[tuple[str | int, ...]] = []
    for root, folders, names in walk(folder):
        light.append((root, os.stat(root).st_mtime_ns))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            if len(files) <= _MAX_FINGERPRINTED_FILES:
                files.append(path)
            if name.lower().endswith(_CAPTION_SUFFIXES):
                light.append(file_fingerprint(path))
    if len(files) > _MAX_FINGERPRINTED_FILES:
        return sorted(light)
    return sorted(file_fingerprint(path) for path in files if os.path.exists(path))


# ---- output ----------------------------------------------------------------------------------------------------------


def run_folder(run_name: str) -> Path:
    """Return output/clip_finetune/<run_name>. Raises `UserError` for a name that is not that of a single folder."""
    name = run_name.strip()
    if not name or name.startswith(".") or any(letter in name for letter in '/\\:*?"<>|\0'):
        raise UserError(
            f"run_name is {run_name!r}; give a plain name such as my_clip, without slashes or a leading dot."
        )
    return Path(folder_paths.get_output_directory(), _RUNS, name)


def image_cache_folder() -> Path:
    """Return the folder of decoded images, which runs and evaluations share and users may delete."""
    return Path(folder_paths.get_output_directory(), _RUNS, ".cache")


def new_output_file(filename_prefix: str) -> Path:
    """Return the next free numbered .safetensors file for a prefix. Raises `UserError` outside ComfyUI's output."""
    output = folder_paths.get_output_directory()
    target = os.path.normpath(os.path.join(output, filename_prefix))
    if not os.path.basename(filename_prefix):
        raise UserError(f"filename_prefix is {filename_prefix!r}; add a file name, such as clip/clip_l.")
    if not target.startswith(os.path.join(os.path.normpath(output), "")) or "\0" in filename_prefix:
        raise UserError(
            f"filename_prefix is {filename_prefix!r}, which is outside ComfyUI's output folder; give a name such as "
            "clip/clip_l."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def relative_to_output(path: Path) -> str:
    return path.relative_to(folder_paths.get_output_directory()).as_posix()
