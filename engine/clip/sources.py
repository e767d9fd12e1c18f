"""Where a model is: a file, a folder of some program's making, or a name on the hub; and what stands beside it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .architecture import Activation
from .reading import INDEX_SUFFIX

HUB_PREFIX = "hf-hub:"
_MAX_CONFIG_BYTES = 1 << 20
# The files of a folder that are a whole model, the best first.
_IN_A_FOLDER = (
    "model.safetensors", f"model.safetensors{INDEX_SUFFIX}", "open_clip_model.safetensors", "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}", "open_clip_pytorch_model.bin",
)  # fmt: skip
_CONFIGS = ("config.json", "open_clip_config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's file, and what is known of it from outside: its activation, and its (vision, text) heads."""

    path: Path
    activation: Activation | None = None
    heads: tuple[int, int] | None = None


def find_source(source: str | os.PathLike) -> Source:
    """The file behind a path, a folder, or a name such as `ViT-L-14/openai` or `hf-hub:laion/CLIP-ViT-L-14-…`.

    Names download from the hub, once. Raises `UserError` with the way out.
    """
    path, name = Path(source), str(source).replace("\\", "/")
    if path.is_dir():
        return _beside(_in_folder(path))
    if path.exists():
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
    """Whether a folder has a model's file under a name that programs give it."""
    return any((folder / name).is_file() for name in _IN_A_FOLDER)


def _in_folder(folder: Path) -> Path:
    for name in _IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1:
        return alone[0]
    raise UserError(
        f"{folder} is a folder without a model.safetensors in it (nor another file that is surely the model); give the "
        "path of the model's file."
    )


def _beside(path: Path) -> Source:
    """With what a `config.json` of Hugging Face's or open_clip's in the same folder says."""
    for name in _CONFIGS:
        config = _read_config(path.parent / name)
        if config.get("model_type") == "clip":
            return _by_hugging_face(path, config)
        if isinstance(config.get("model_cfg"), Mapping):
            return _by_open_clip(path, config["model_cfg"])
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


def _by_hugging_face(path: Path, config: Mapping[str, Any]) -> Source:
    text, vision = _section(config, "text_config"), _section(config, "vision_config")
    # Hugging Face leaves out what equals its defaults, which are those of ViT-B/32.
    heads = (vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8))
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu") or vision.get("hidden_act", "quick_gelu") != activation:
        raise UserError(
            f"{path.parent / 'config.json'} says that the towers compute {activation!r} and "
            f"{vision.get('hidden_act', 'quick_gelu')!r}; only CLIPs with quick_gelu or gelu in both can be opened."
        )
    return Source(path, activation, heads if all(type(count) is int and count > 0 for count in heads) else None)


def _by_open_clip(path: Path, config: Mapping[str, Any]) -> Source:
    text, vision = _section(config, "text_cfg"), _section(config, "vision_cfg")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    counts = (width, head_width, text.get("heads", 8))
    heads = (width // head_width, counts[2]) if all(type(n) is int and n > 0 for n in counts) else None
    layers = vision.get("layers", 12)
    if isinstance(layers, list) and heads:
        heads = (width * 32 // head_width, counts[2])
    return Source(path, "quick_gelu" if config.get("quick_gelu") is True else "gelu", heads)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return config[name] if isinstance(config.get(name), Mapping) else {}


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
        file = open_clip.download_pretrained(pretrained)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(f"{model}/{tag}", error) from error
    quick = pretrained.get("quick_gelu", False) or config.get("quick_gelu", False)
    return Source(Path(file), "quick_gelu" if quick else "gelu", _by_open_clip(Path(file), config).heads)


def _download_folder(name: str) -> Path:
    """The folder that the hub's cache keeps of a model: its best file and its configs."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        kept = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(_CONFIGS))
        for wanted in _IN_A_FOLDER:
            patterns = (
                [wanted, wanted.replace(INDEX_SUFFIX, "").replace(".", "-*.")] if INDEX_SUFFIX in wanted else [wanted]
            )
            kept = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
            if Path(kept, wanted).is_file():
                break
    except (OSError, RuntimeError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _not_downloaded(f"{HUB_PREFIX}{name}", error) from error
    return Path(kept)


def _not_downloaded(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"{name} could not be downloaded ({reason}); check the name and the network, or put the model's .safetensors "
        "file on disk and choose that."
    )
