"""Where a model is: a file, a folder of some program's making, or a name on the hub; and what stands beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line, shown
from .tensor_files import INDEX_SUFFIX
from .variants.resnet import feature_width

HUB_PREFIX = "hf-hub:"
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


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's file, and what a configuration beside it tells: sizes, heads and activation by the names that
    `Architecture` has for them, or in place of the activation, as "trouble", why it cannot be used: a sentence."""

    path: Path
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_model_source(source: str | os.PathLike) -> Source:
    """The file behind a path, a folder, or a name such as `ViT-L-14/openai` or `hf-hub:laion/CLIP-ViT-L-14-…`.

    Names download from the hub, once. Raises `UserError` with the way out.
    """
    path, name = Path(source), str(source).replace("\\", "/")
    if os.path.isdir(path):  # which is no error for a name that cannot be, as Path's own is
        return _beside(_in_folder(path))
    if os.path.exists(path):
        return _beside(path)
    if name.startswith(HUB_PREFIX):
        return _beside(_in_folder(_download_folder(name.removeprefix(HUB_PREFIX))))
    model, slash, tag = name.partition("/")
    if path.suffix or not slash or "/" in tag:
        raise UserError(
            f"{source} does not exist; give a model file, or a name such as ViT-L-14/openai or hf-hub:owner/model."
        )
    return _download(model, tag)


def holds_a_model(folder: Path) -> bool:
    """Whether there is one file in a folder that is surely its model."""
    return _the_model_in(folder) is not None


def _the_model_in(folder: Path) -> Path | None:
    for name in _IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    alone = sorted(folder.glob("*.safetensors"))
    return alone[0] if len(alone) == 1 else None


def _in_folder(folder: Path) -> Path:
    if found := _the_model_in(folder):
        return found
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a diffusers pipeline; give the text encoder in it: {folder / 'text_encoder'}.")
    raise UserError(
        f"{folder} is a folder without a model.safetensors in it, nor another file that is surely the model; give the "
        "path of the model's file."
    )


def _beside(path: Path) -> Source:
    """With what a `config.json` of Hugging Face's or open_clip's in the same folder says."""
    for name in _CONFIGS:
        config = _read_config(path.parent / name)
        if config.get("model_type") == "clip":
            return _by_hugging_face(path, {tower: _section(config, f"{tower}_config") for tower in _HF_DEFAULTS})
        for tower in _HF_DEFAULTS:
            if config.get("model_type") == f"clip_{tower}_model":
                return _by_hugging_face(path, {tower: config})
        if isinstance(config.get("model_cfg"), Mapping):
            return Source(path, _told_by_open_clip(config["model_cfg"]))
    return Source(path)


def _read_config(file: Path) -> Mapping[str, Any]:
    """The JSON object in a small file; empty for one that is not there or is some other program's."""
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, Mapping) else {}


# What Hugging Face leaves out of a config.json equals these, the sizes of ViT-B/32.
_HF_DEFAULTS = {
    "text": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
    "vision": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
_HF_NAMES = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}


def _by_hugging_face(path: Path, towers: Mapping[str, Mapping[str, Any]]) -> Source:
    told = {
        f"{tower}_{ours}": config.get(theirs, _HF_DEFAULTS[tower][theirs])
        for tower, config in towers.items()
        for theirs, ours in _HF_NAMES.items()
    }
    activations = [config.get("hidden_act", "quick_gelu") for config in towers.values()]
    if activations[0] in ("quick_gelu", "gelu") and activations.count(activations[0]) == len(activations):
        return Source(path, _sizes_only(told) | {"activation": activations[0]})
    trouble = (
        f"{path.parent / 'config.json'} says that the towers compute {' and '.join(map(shown, activations))}; only "
        "CLIPs with quick_gelu or gelu in both can be opened: choose another, or set the activation."
    )
    return Source(path, _sizes_only(told) | {"trouble": trouble})


def _told_by_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = _section(config, "text_cfg"), _section(config, "vision_cfg")
    width, head_width, layers = vision.get("width", 768), vision.get("head_width", 64), vision.get("layers", 12)
    told = _sizes_only(
        {
            "text_width": text.get("width", 512),
            "text_layers": text.get("layers", 12),
            "text_heads": text.get("heads", 8),
            "vision_width": width,
            "head_width": head_width,
        }
    )
    if {"vision_width", "head_width"} <= told.keys():
        # The heads of a ResNet, whose layers are a list, are those of its attention pooling.
        told["vision_heads"] = (feature_width(width) if isinstance(layers, list) else width) // head_width
    told.pop("head_width", None)
    return told | {"activation": "quick_gelu" if config.get("quick_gelu") is True else "gelu"}


def _sizes_only(told: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is no size, which another program's file may hold under these names."""
    return {name: value for name, value in told.items() if type(value) is int and 0 < value < 2**31}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a configuration; what stands under name_dict, as older files have it, goes before."""
    found = [config[key] for key in (name, f"{name}_dict") if isinstance(config.get(key), Mapping)]
    return {key: value for part in found for key, value in part.items()}


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _download(model: str, tag: str) -> Source:
    """One of open_clip's pretrained models."""
    import open_clip

    pretrained, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    if not pretrained or not config:
        raise UserError(
            f"{model}/{tag} is neither a file nor a model that open_clip knows; the best known is ViT-L-14/openai."
        )
    try:
        with _quietly():
            file = open_clip.download_pretrained(pretrained)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(f"{model}/{tag}", error) from error
    quick = pretrained.get("quick_gelu", False) or config.get("quick_gelu", False)
    return Source(Path(file), _told_by_open_clip({**config, "quick_gelu": bool(quick)}))


def _download_folder(name: str) -> Path:
    """The folder that the hub's cache keeps of a model: its best file and its configs."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")

    def fetched(*files: str) -> Path:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=files))

    try:
        with _quietly():
            kept = fetched(*_CONFIGS)
            for wanted in _IN_A_FOLDER:
                shards = [f"{wanted.removesuffix(INDEX_SUFFIX).replace('.', '-*.')}"] if INDEX_SUFFIX in wanted else []
                if (fetched(wanted, *shards) / wanted).is_file():
                    break
    except (OSError, RuntimeError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _not_downloaded(f"{HUB_PREFIX}{name}", error) from error
    return kept


@contextlib.contextmanager
def _quietly():
    """Without the dozen lines that the hub's library logs while it retries; what failed is said once, at the end."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _not_downloaded(name: str, error: Exception) -> UserError:
    reason = one_line(error).split(". ")[0] or type(error).__name__
    return UserError(
        f"{name} could not be downloaded ({reason}); check the name and the network, or put the model's .safetensors "
        "file on disk and choose that."
    )
