"""The only file that talks to ComfyUI: folders, device, memory, progress, cancel, previews and CLIP sockets."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy
import torch
from server import PromptServer

from ...engine.clip.tensor_files import INDEX_SUFFIX
from ...engine.data.images.folder_tree import walk
from ...engine.data.readers.sidecars import holds_captioned_images
from ...engine.errors import UserError

MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PRETRAINED = (
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
    "ViT-B-16/openai",
    "ViT-B-32/openai",
    "RN50/openai",
    "ViT-bigG-14/laion2b_s39b_b160k",
)
_PRETRAINED_PREFIX = "pretrained: "
_RUNS = "clip_finetune"
_MAX_FINGERPRINTED = 50_000
_MOST_LOOKED_INTO = 1000  # folders of the output folder, each time that the list is made


def register_folders() -> None:
    """Tell ComfyUI of models/full_clip, output/full_clip and output/clip_vision, and of a datasets folder where it has
    none of its own."""
    output = folder_paths.get_output_directory()
    folder_paths.add_model_folder_path("full_clip", os.path.join(folder_paths.models_dir, "full_clip"))
    folder_paths.add_model_folder_path("full_clip", os.path.join(output, "full_clip"))
    folder_paths.add_model_folder_path("clip_vision", os.path.join(output, "clip_vision"))
    if "datasets" not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path("datasets", os.path.join(folder_paths.base_path, "datasets"))


# ---- files that widgets name -----------------------------------------------------------------------------------------


def list_models() -> list[str]:
    """Files of the model folders, best models of runs, and names that download when they are used."""
    files = [name for name in folder_paths.get_filename_list("full_clip") if _is_a_whole_model(name)]
    output = Path(folder_paths.get_output_directory())
    runs = sorted(path.relative_to(output).as_posix() for path in (output / _RUNS).glob("*/best.safetensors"))
    return [*files, *runs, *(_PRETRAINED_PREFIX + name for name in PRETRAINED)]


def _is_a_whole_model(name: str) -> bool:
    """Whether a file's name is that of a model, or of the index of one in several files, which are not listed."""
    name = name.lower()
    return name.endswith(INDEX_SUFFIX) or name.endswith(MODEL_SUFFIXES) and not re.search(r"-\d{5}-of-\d{5}\.", name)


def find_model(name: str) -> str:
    """The path or hub name behind an entry of `list_models`; refuses whatever is not listed now."""
    if name not in list_models():
        raise UserError(f"{name!r} is not among the full CLIP models; press R to refresh the list and choose again.")
    if name.startswith(_PRETRAINED_PREFIX):
        return name.removeprefix(_PRETRAINED_PREFIX)
    if name.startswith(f"{_RUNS}/") and name.endswith("/best.safetensors"):
        return os.path.join(folder_paths.get_output_directory(), name)
    return folder_paths.get_full_path_or_raise("full_clip", name)


def _dataset_folders() -> dict[str, str]:
    """Folders below the datasets roots (two levels) and the input folder, and those below the output folder (two
    levels) in which captions lie beside pictures, by the name that is shown: one that is taken begins with where the
    folder lies."""
    places = [("datasets", root, _subfolders(root, 2)) for root in folder_paths.get_folder_paths("datasets")]
    root = folder_paths.get_input_directory()
    places.append(("input", root, _subfolders(root, 1)))
    places.append(("output", *_captioned_output()))
    found: dict[str, str] = {}
    for place, root, names in places:
        for name in names:
            found.setdefault(f"{place}/{name}" if name in found else name, os.path.join(root, name))
    return found


def _captioned_output() -> tuple[str, list[str]]:
    """The output folder and those of its subfolders in which captions lie beside pictures, runs of trainings aside."""
    root = folder_paths.get_output_directory()
    names = [name for name in _subfolders(root, 2) if name.split("/")[0] != _RUNS]
    return root, [name for name in names[:_MOST_LOOKED_INTO] if holds_captioned_images(os.path.join(root, name))]


def _subfolders(root: str, depth: int) -> list[str]:
    """Return the folders below `root`, down to `depth` levels, by their paths from it; hidden ones are left out.

    A link is listed like a folder, but what lies in a real folder is listed once.
    """
    found = []
    for folder, names, _ in walk(root):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != root else ""
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [prefix + name for name in names]
        if prefix.count("/") + 1 >= depth:
            names.clear()
    return sorted(found, key=lambda name: name.split("/"))


def list_datasets() -> list[str]:
    return list(_dataset_folders())


def find_dataset(name: str) -> str:
    """The folder behind an entry of `list_datasets`; refuses whatever is not listed now."""
    folders = _dataset_folders()
    if name not in folders:
        raise UserError(
            f"{name!r} is not among the data set folders; put your pictures into a folder inside ComfyUI's datasets or "
            "input folder (or, with captions beside them, output), press R to refresh the list, and choose it."
        )
    return folders[name]


def dataset_path(name: str) -> Path:
    """The folder of this name in the first datasets root, whether it is there or not."""
    plain = re.sub(r'[/\\:*?"<>|\0]+', "_", name).strip(" .") or "dataset"
    return Path(folder_paths.get_folder_paths("datasets")[0], plain)


def new_dataset_folder(name: str) -> tuple[str, Path]:
    """(the entry of `list_datasets` that it will be, its path) of a folder in the first datasets root that is free."""
    place = dataset_path(name)
    places = (place if number == 1 else place.with_name(f"{place.name}_{number}") for number in itertools.count(1))
    free = next(place for place in places if not os.path.lexists(place))
    return free.name, free


def prepared_images_folder() -> Path:
    """Where pictures from the graph are kept while ComfyUI runs: it empties its temp folder when it starts."""
    return Path(folder_paths.get_temp_directory(), "clip_finetune_pictures")


def file_fingerprint(path: str) -> tuple:
    """Changes when the file does."""
    if not os.path.isfile(path):
        return (path,)
    stat = os.stat(path)
    return (path, stat.st_size, stat.st_mtime_ns)


def folder_fingerprint(folder: str) -> list[tuple]:
    """Changes when a file in the folder does; of more than 50,000 files, only caption files and folders (the node's
    help says it)."""
    files, light = [], []
    for root, folders, names in walk(folder):
        light.append((root, os.stat(root).st_mtime_ns))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            if len(files) <= _MAX_FINGERPRINTED:
                files.append(path)
            if name.lower().endswith((".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".caption")):
                light.append(file_fingerprint(path))
    return sorted(light if len(files) > _MAX_FINGERPRINTED else map(file_fingerprint, filter(os.path.exists, files)))


# ---- places to write to ----------------------------------------------------------------------------------------------


def run_folder(run_name: str) -> Path:
    """output/clip_finetune/<run_name>; refuses a name that is not that of one folder."""
    name = run_name.strip()
    if not name or name.startswith(".") or any(letter in name for letter in '/\\:*?"<>|\0'):
        raise UserError(
            f"run_name is {run_name!r}; give a plain name such as my_clip, without slashes or a leading dot."
        )
    return Path(folder_paths.get_output_directory(), _RUNS, name)


def image_cache_folder() -> Path:
    """Where decoded pictures are kept for the next epoch, run or evaluation: output/clip_finetune/.cache, which may be
    deleted at any time."""
    return Path(folder_paths.get_output_directory(), _RUNS, ".cache")


def new_output_file(filename_prefix: str) -> Path:
    """The next free numbered .safetensors file for a prefix, in ComfyUI's output folder; refuses to leave it."""
    output = folder_paths.get_output_directory()
    target = os.path.normpath(os.path.join(output, filename_prefix))
    inside = target.startswith(os.path.join(os.path.normpath(output), ""))
    if not os.path.basename(filename_prefix):
        raise UserError(f"filename_prefix is {filename_prefix!r}; give a file's name too, such as clip/clip_l.")
    if not inside or "\0" in filename_prefix:
        raise UserError(
            f"filename_prefix is {filename_prefix!r}, which is outside ComfyUI's output folder; give a name such as "
            "clip/clip_l."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def relative_to_output(path: Path) -> str:
    return path.relative_to(folder_paths.get_output_directory()).as_posix()


# ---- device, progress, cancel ----------------------------------------------------------------------------------------


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def check_cancelled() -> None:
    """Raises the host's interrupt if the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextlib.contextmanager
def whole_device():
    """ComfyUI's models leave the device while something else needs it."""
    management = comfy.model_management
    management.unload_all_models()
    management.soft_empty_cache()
    before = getattr(management, "in_training", None)
    try:
        if before is not None:
            management.in_training = True
        yield
    finally:
        if before is not None:
            management.in_training = before
        management.soft_empty_cache()


class Display:
    """A node's progress bar, its live picture and the text under it."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self.lines: list[str] = []
        self.next_image = 0.0

    def count(self, done: int, total: int) -> None:
        self.bar.update_absolute(done, max(total, 1))

    def picture(self, done: int, total: int, draw: Callable) -> None:
        """Count, and show `draw()` (PIL, RGB) at most every two seconds and for at most a twentieth of the time."""
        now = time.monotonic()
        if now < self.next_image and done < total:
            self.count(done, total)
            return
        drawn = draw().convert("RGB")  # a preview with an alpha channel ends the host's server
        self.bar.update_absolute(done, max(total, 1), ("JPEG", drawn, drawn.width))
        cost = time.monotonic() - now
        self.next_image = now + max(2.0, 20 * cost)

    def say(self, sentence: str) -> None:
        """Add a sentence, or a table under a heading, to the text under the node."""
        if sentence and sentence not in self.lines:
            self.lines.append(sentence)
            self._send()

    def conclude(self, *sentences: str) -> None:
        """Say what came out; the last sentence that is said stands on top, so the first of these is said last."""
        for sentence in reversed(sentences):
            self.say(sentence)

    def status(self, line: str) -> None:
        """Show a line below the sentences until the next one."""
        self._send(line)

    def _send(self, *more: str) -> None:
        if self.node_id is not None and PromptServer.instance is not None:
            # The page shows the first lines, in letters of unequal width: tables go last, with dots between columns.
            sentences = [line for line in self.lines if "\n" not in line]
            tables = [_without_columns(line) for line in self.lines if "\n" in line]
            text = "\n".join([*more, *reversed(sentences), *tables])
            PromptServer.instance.send_progress_text(text, self.node_id)


def _without_columns(table: str) -> str:
    lines = [re.sub(r" {2,}", " · ", line.strip()) for line in table.splitlines()]
    return "\n".join(line for line in lines if line.strip("- ·"))


def image_array(image: torch.Tensor) -> numpy.ndarray:
    """One picture of an IMAGE, [height, width, channels] from 0 to 1, as uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def image_tensor(picture) -> torch.Tensor:
    """PIL RGB to an IMAGE: float32 [1, height, width, 3] from 0 to 1."""
    return torch.from_numpy(numpy.array(picture.convert("RGB"), dtype=numpy.float32) / 255.0)[None]


# ---- CLIP and CLIP_VISION sockets ------------------------------------------------------------------------------------

CLIP_L, CLIP_G = "clip_l", "clip_g"  # what ComfyUI calls the parts of a CLIP, whatever model it belongs to
_POSITIONS = "text_model.embeddings.position_embedding.weight"


def clip_from_file(path: Path):
    """A CLIP socket that holds this text encoder alone, as CLIPLoader makes it."""
    return comfy.sd.load_clip(
        [str(path)], folder_paths.get_folder_paths("embeddings"), comfy.sd.CLIPType.STABLE_DIFFUSION
    )


def clip_from_tensors(*parts: Mapping[str, torch.Tensor]):
    """A CLIP socket of one text encoder, or of SDXL's two."""
    return comfy.sd.load_text_encoder_state_dicts(
        [dict(part) for part in parts], folder_paths.get_folder_paths("embeddings"), comfy.sd.CLIPType.STABLE_DIFFUSION
    )


def text_encoder_tensors(clip, part: str) -> dict[str, torch.Tensor]:
    """A part of a CLIP socket under Hugging Face's names, LoRAs applied; copies on the CPU."""
    clip.load_model()
    prefix = f"{part}.transformer."
    found = {
        name.removeprefix(prefix): torch.as_tensor(tensor).detach().to("cpu", copy=True)
        for name, tensor in clip.state_dict_for_saving().items()
        if name.startswith(prefix)
    }
    if not found:
        raise _without(part)
    return found


def replace_text_encoder(clip, part: str, tensors: Mapping[str, torch.Tensor]):
    """A clone of the CLIP with these tensors as one of its parts; the original and the other parts stay as they are.

    A CLIP-L with more positions (Long-CLIP) needs a new CLIP, which is made for SD1.5 and SDXL.
    """
    have, prefix = clip.patcher.model.state_dict(), f"{part}.transformer."
    if unknown := [name for name in tensors if prefix + name not in have]:
        raise (
            _without(part)
            if len(unknown) == len(tensors)
            else UserError(f"The CLIP that is connected has no {unknown[0]}; connect another one.")
        )
    for name, tensor in tensors.items():
        found = tuple(have[prefix + name].shape)
        if found == tuple(tensor.shape):
            continue
        if name == _POSITIONS and part == CLIP_L and found[1:] == tuple(tensor.shape[1:]):
            return _with_other_positions(clip, tensors)
        raise UserError(
            f"The CLIP that is connected has another shape of {_spoken(part)}: {name} is {found} there and "
            f"{tuple(tensor.shape)} in the trained model."
        )
    clone = clip.clone()
    applied = clone.add_patches({prefix + name: ("set", (tensor,)) for name, tensor in tensors.items()})
    if missing := [name for name in tensors if prefix + name not in applied]:
        raise UserError(f"ComfyUI did not accept the new {missing[0]} of the {_spoken(part)}; nothing was replaced.")
    return clone


def _with_other_positions(clip, clip_l: Mapping[str, torch.Tensor]):
    kind = type(clip.cond_stage_model).__name__
    if kind not in ("SD1ClipModel", "SDXLClipModel"):
        raise UserError(
            f"The trained text encoder reads {len(clip_l[_POSITIONS])} tokens; ComfyUI takes such a one for SD1.5 and "
            "SDXL only. Connect a clip of these, or none."
        )
    others = [text_encoder_tensors(clip, CLIP_G)] if kind == "SDXLClipModel" else []
    made = clip_from_tensors(clip_l, *others)
    made.clip_layer(clip.layer_idx)
    return made


def _without(part: str) -> UserError:
    models = "an SD1.5, SDXL, SD3 or Flux model" if part == CLIP_L else "an SDXL or SD3 model"
    return UserError(f"The CLIP that is connected holds no {_spoken(part)}; connect that of {models}.")


def _spoken(part: str) -> str:
    return part.upper().replace("_", "-")


def vision_encoder_tensors(clip_vision) -> dict[str, torch.Tensor]:
    """What a CLIP_VISION socket holds, under Hugging Face's names; copies on the CPU."""
    if clip_vision is None or not any(name.startswith("vision_model.") for name in clip_vision.get_sd()):
        raise UserError("The clip_vision that is connected is not a CLIP's; connect a ViT-L/14's.")
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in clip_vision.get_sd().items()}


def vision_activation(clip_vision) -> str | None:
    """What ComfyUI computes in the MLPs of a CLIP_VISION."""
    return clip_vision.config.get("hidden_act") if hasattr(clip_vision, "config") else None
