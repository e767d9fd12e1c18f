"""Open a full CLIP: find the model's file (a path, a folder, a name on the hub), read it, and make it a FullCLIP."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError, one_line, shown
from ..files import AnyPath
from . import names
from .architecture import ACTIVATIONS, NO_HINTS, Activation, Hints, architecture_from_shapes
from .full_clip import FullCLIP, read_metadata
from .health import BROKEN_MERGE, made_by_a_broken_merge
from .tensor_files import INDEX_SUFFIX, read_contents
from .variants.long_clip import LONG_CONTEXT, stretch_context, with_one_table
from .variants.resnet import feature_width

HUB_PREFIX = "hf-hub:"
_NO_CURE = "The real out_proj is lost: training cannot bring it back. Use the model that it was made from."
_MAX_CONFIG_BYTES = 1 << 20
# The files of a folder that are a whole model, the best first.
_IN_A_FOLDER = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
    "open_clip_pytorch_model.bin",
    "best.safetensors",
)
_CONFIGS = ("config.json", "open_clip_config.json")


def load_full_clip(
    source: AnyPath,
    *,
    activation: Activation | str = "auto",
    context_length: int | None = None,
    in_memory: bool = False,
) -> FullCLIP:
    """Open a full CLIP: a file that any program made, a folder, or a name such as `ViT-L-14/openai`.

    Tensors are memory-mapped unless `in_memory` (except those of torch's format before 1.6): while the model is in use,
    its file may be replaced (not on Windows) but must not be written into. `activation` overrides what the file says or
    what would be assumed. `context_length` 248 stretches a model that reads 77 tokens. Names download from the hub.
    Nothing in a file is executed. Raises `UserError`.
    """
    chosen = next((known for known in ACTIVATIONS if known == activation), None)
    if chosen is None and activation != "auto":
        raise UserError(f"The activation {activation!r} is not known; choose auto, quick_gelu or gelu.")
    if context_length not in (None, LONG_CONTEXT):
        raise UserError(f"The context length {context_length} is not known; leave it out, or choose {LONG_CONTEXT}.")
    model = find_model_source(source)
    contents = read_contents(model.path, in_memory=in_memory)
    try:
        tensors = _to_openai_names(contents.tensors)
        provenance: dict[str, Any] = {"source": model.path.name}
        if description := read_metadata(contents.metadata, chosen):
            architecture, notes = description.architecture, description.notes
            provenance |= description.provenance
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            architecture, notes = architecture_from_shapes(
                shapes, activation=chosen, hints=contents.hints, config=model.config
            )
        notes += contents.notes
        if made_by_a_broken_merge(tensors):
            notes += (f"{model.path.name} {BROKEN_MERGE} {_NO_CURE}",)
        full_clip = FullCLIP(architecture, tensors, provenance, notes)
        return stretch_context(full_clip) if context_length else full_clip
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _to_openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kind = kind_of(tensors)
    if kind != "full_clip":
        raise UserError(_OTHER_KINDS[kind])
    try:
        renamed = names.to_openai(tensors)
    except KeyError as error:
        raise UserError(
            f"this is not a full CLIP: the tensor {error.args[0]} is missing; download the file again."
        ) from error
    for name, tensor in renamed.items():
        if tensor.dtype not in names.WEIGHT_DTYPES:
            raise UserError(
                f"the tensor {name} holds {tensor.dtype}, which is not a weight; use the fp16 or fp32 file of "
                "this model."
            )
    scale = renamed.get("logit_scale")
    if scale is not None and scale.numel() == 1:
        renamed["logit_scale"] = scale.reshape(())
    return with_one_table(renamed)


# ---- kinds of model files --------------------------------------------------------------------------------------------


_OTHER_KINDS = {
    "text_encoder": "this is a text encoder only; merge it into a full CLIP first (MergeTEWithVision, or clip-finetune "
    "merge).",
    "vision_encoder": "this is a vision encoder only; merge it into a full CLIP first (clip-finetune merge --vision).",
    "training_state": "this is the saved state of a training run; open best.safetensors beside it.",
    "checkpoint": "this is an image model, not a CLIP; take the text encoder out of it and merge that into a full CLIP "
    "(MergeTEWithVision with the checkpoint's CLIP, or clip-finetune merge --text with this file).",
    "lora": "this is a LoRA, not a model; apply it to a CLIP in ComfyUI, and merge that (MergeTEWithVision).",
    "unknown": "this is not a CLIP: it has neither a text tower nor a vision tower; choose another file.",
}


def kind_of(tensor_names: Iterable[str]) -> str:
    """Return what a file with these tensors is: full_clip, or one of _OTHER_KINDS."""
    unwrapped = names.unwrapped(dict.fromkeys(tensor_names))

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in unwrapped)

    if any_starts("optimizer."):
        return "training_state"
    if any_starts("diffusion_model.", "model.diffusion_model.", "double_blocks."):
        return "checkpoint"
    if any(name.startswith("lora_") or ".lora_" in name for name in unwrapped):
        return "lora"
    tokens = any(name.endswith("token_embedding.weight") for name in unwrapped)
    vision = any_starts("visual.", "vision_model.")
    if vision and (tokens or any_starts("text_model.", "transformer.resblocks.")):
        return "full_clip"
    return "text_encoder" if tokens else "vision_encoder" if vision else "unknown"


# ---- from a path or a name to a file ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's file, and what a config beside it says."""

    path: Path
    config: Hints = NO_HINTS


def find_model_source(source: AnyPath) -> ModelSource:
    """Find the file behind a path, a folder, or a name such as `ViT-L-14/openai` or `hf-hub:laion/CLIP-ViT-L-14-…`.

    Names download from the hub, once. Raises `UserError` that says what to do.
    """
    path, name = Path(source), str(source).replace("\\", "/")
    if os.path.isdir(path):  # unlike Path.is_dir, this accepts names that cannot exist
        return _with_config(_model_of_folder(path))
    if os.path.exists(path):
        return _with_config(path)
    if name.startswith(HUB_PREFIX):
        return _with_config(_model_of_folder(_download_folder(name.removeprefix(HUB_PREFIX))))
    model, slash, tag = name.partition("/")
    if path.suffix or not slash or "/" in tag:
        raise UserError(
            f"{source} does not exist; give a model file, or a name such as ViT-L-14/openai or hf-hub:owner/model."
        )
    return _download_from_open_clip(model, tag)


def model_in_folder(folder: Path) -> Path | None:
    """Return the one file in a folder that is surely its model, None if there is no such file."""
    for name in _IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _model_of_folder(folder: Path) -> Path:
    if path := model_in_folder(folder):
        return path
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a diffusers pipeline; give the text encoder in it: {folder / 'text_encoder'}.")
    raise UserError(
        f"{folder} is a folder without a model.safetensors in it, nor another file that is surely the model; give the "
        "path of the model's file."
    )


# ---- configs beside a file -------------------------------------------------------------------------------------------


# What Hugging Face leaves out of a config.json equals these, the sizes of ViT-B/32.
_HF_DEFAULTS = {
    "text": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
    "vision": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
_HF_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}


def _with_config(path: Path) -> ModelSource:
    """Read Hugging Face's or open_clip's config in the folder of a model file, if there is one."""
    for name in _CONFIGS:
        config = _read_config(path.with_name(name))
        if config.get("model_type") == "clip":
            towers = {tower: _section(config, f"{tower}_config") for tower in _HF_DEFAULTS}
            return ModelSource(path, _hints_of_hugging_face(towers, path))
        for tower in _HF_DEFAULTS:
            if config.get("model_type") == f"clip_{tower}_model":
                return ModelSource(path, _hints_of_hugging_face({tower: config}, path))
        if isinstance(config.get("model_cfg"), Mapping):
            return ModelSource(path, _hints_of_open_clip(config["model_cfg"]))
    return ModelSource(path)


def _read_config(file: Path) -> Mapping[str, Any]:
    """Return the JSON object in a small file; an empty one for a missing file or one that is not JSON."""
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, Mapping) else {}


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a config; entries under the older name `<name>_dict` come first."""
    section: dict[str, Any] = {}
    for key in (name, f"{name}_dict"):
        if isinstance(config.get(key), Mapping):
            section |= config[key]
    return section


def _hints_of_hugging_face(towers: Mapping[str, Mapping[str, Any]], path: Path) -> Hints:
    sizes = _sizes_only(
        {
            f"{tower}_{field}": config.get(name, _HF_DEFAULTS[tower][name])
            for tower, config in towers.items()
            for name, field in _HF_FIELDS.items()
        }
    )
    activations = [config.get("hidden_act", "quick_gelu") for config in towers.values()]
    for activation in ACTIVATIONS:
        if all(other == activation for other in activations):
            return Hints(sizes, activation)
    problem = (
        f"{path.with_name('config.json')} says that the towers compute {' and '.join(map(shown, activations))}; only "
        "CLIPs with quick_gelu or gelu in both can be opened: choose another, or set the activation."
    )
    return Hints(sizes, problem=problem)


def _hints_of_open_clip(config: Mapping[str, Any]) -> Hints:
    text, vision = _section(config, "text_cfg"), _section(config, "vision_cfg")
    sizes = _sizes_only(
        {
            "text_width": text.get("width", 512),
            "text_layers": text.get("layers", 12),
            "text_heads": text.get("heads", 8),
            "vision_width": vision.get("width", 768),
            "head_width": vision.get("head_width", 64),
        }
    )
    head_width, width = sizes.pop("head_width", None), sizes.get("vision_width")
    if head_width and width:
        # The heads of a ResNet, whose layers are a list, are those of its attention pooling.
        resnet = isinstance(vision.get("layers"), list)
        sizes["vision_heads"] = (feature_width(width) if resnet else width) // head_width
    return Hints(sizes, "quick_gelu" if config.get("quick_gelu") is True else "gelu")


def _sizes_only(values: Mapping[str, object]) -> dict[str, int]:
    """Keep what can be a size: another program's file may hold anything under these names."""
    return {name: value for name, value in values.items() if type(value) is int and 0 < value < 2**31}


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _download_from_open_clip(model: str, tag: str) -> ModelSource:
    """Download one of open_clip's pretrained models."""
    import open_clip

    pretrained, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    if not pretrained or not config:
        raise UserError(
            f"{model}/{tag} is neither a file nor a model that open_clip knows; the best known is ViT-L-14/openai."
        )
    try:
        with _hub_log_silenced():
            file = open_clip.download_pretrained(pretrained)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(f"{model}/{tag}", error) from error
    quick = pretrained.get("quick_gelu", False) or config.get("quick_gelu", False)
    return ModelSource(Path(file), _hints_of_open_clip({**config, "quick_gelu": bool(quick)}))


def _download_folder(name: str) -> Path:
    """Download a model's configs and its best file, and return the folder that the hub's cache keeps of it."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")

    def download(*patterns: str) -> Path:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
        return Path(folder)

    try:
        with _hub_log_silenced():
            folder = download(*_CONFIGS)
            for file in _IN_A_FOLDER:
                # model.safetensors.index.json names the shards model-00001-of-00002.safetensors and so on
                shards = [file.removesuffix(INDEX_SUFFIX).replace(".", "-*.")] if INDEX_SUFFIX in file else []
                if (download(file, *shards) / file).is_file():
                    break
    except (OSError, RuntimeError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _not_downloaded(f"{HUB_PREFIX}{name}", error) from error
    return folder


@contextlib.contextmanager
def _hub_log_silenced() -> Iterator[None]:
    """Silence the dozen lines that the hub's library logs while it retries; the caller reports the failure once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _not_downloaded(name: str, error: Exception) -> UserError:
    reason = one_line(error).split(". ")[0] or type(error).__name__
    return UserError(
        f"{name} could not be downloaded ({reason}); check the name and the network, or put the model's .safetensors "
        "file on disk and choose that."
    )
