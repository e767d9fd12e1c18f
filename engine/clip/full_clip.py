"""FullCLIP, the value that goes from node to node, and how it gets from a file and into one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import names
from .architecture import (
    ASSUMED_ACTIVATION,
    Activation,
    Architecture,
    Parameterization,
    architecture_from_shapes,
    check_shapes,
    is_assumption,
    parameterization_of,
)
from .files import read_tensors, write_safetensors

METADATA_KEY = "clip_finetune"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class FullCLIP:
    """Both towers, both projections and `logit_scale`, as an immutable value.

    `state_dict` holds CPU tensors under OpenAI's names, in the dtypes they were stored in; nobody writes into them.
    `notes` are sentences for the user about what had to be assumed or was done. `provenance` is plain JSON.
    """

    architecture: Architecture
    state_dict: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "state_dict", MappingProxyType(dict(self.state_dict)))
        check_shapes({name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}, self.architecture)

    @functools.cached_property
    def parameterization(self) -> Parameterization:
        return parameterization_of(self.state_dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors by their torch names, the most used (in elements) first."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.state_dict.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return tuple(str(dtype).removeprefix("torch.") for dtype in sorted(sizes, key=sizes.__getitem__, reverse=True))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every tensor's name, dtype and bits."""
        digest = hashlib.sha256(json.dumps(self.architecture.as_dict(), sort_keys=True).encode())
        for name in sorted(self.state_dict):
            tensor = self.state_dict[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def derive(
        self, changed: Mapping[str, Tensor], *, step: str, dropped: Iterable[str] = (), notes: Iterable[str] = ()
    ) -> FullCLIP:
        """A new value with these tensors changed or added; it shares the rest with this one.

        `step` says in a few words what was done; it is appended to the provenance's history.
        """
        dropped = set(dropped)
        tensors = {name: tensor for name, tensor in self.state_dict.items() if name not in dropped}
        history = [*self.provenance.get("history", ()), step]
        return FullCLIP(
            architecture=self.architecture,
            state_dict=tensors | dict(changed),
            provenance={**self.provenance, "history": history},
            notes=(*self.notes, *(note for note in notes if note not in self.notes)),
        )


def load_full_clip(
    source: str | os.PathLike, *, activation: Activation | str = "auto", in_memory: bool = False
) -> FullCLIP:
    """Open a full CLIP: a file, a folder with `model.safetensors` in it, or a name such as `ViT-L-14/openai`.

    Tensors come memory-mapped from safetensors unless `in_memory`. `activation` overrides what the file says or what
    would be assumed. Names download from the hub through open_clip. Raises `UserError`.
    """
    if activation not in ("auto", "quick_gelu", "gelu"):
        raise UserError(f"The activation {activation!r} is not known; choose auto, quick_gelu or gelu.")
    path, known = find_file(source)
    tensors, metadata = read_tensors(path, in_memory=in_memory)
    ours = _our_metadata(metadata, path)
    config = _hf_config(path)
    try:
        tensors = _to_openai_names(tensors)
        chosen = None if activation == "auto" else activation
        said = (ours or {}).get("activation") or (config or {}).get("activation") or known
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if ours is not None:
            architecture = Architecture.from_dict(ours["architecture"] | {"activation": chosen or said})
            notes: tuple[str, ...] = tuple(ours.get("notes", ()))
            if chosen:
                notes = tuple(note for note in notes if note != ASSUMED_ACTIVATION)
        else:
            heads = config["heads"] if config else None
            architecture, notes = architecture_from_shapes(shapes, activation=chosen or said, heads=heads)
        provenance = dict((ours or {}).get("provenance") or {"source": path.name})
        return FullCLIP(architecture, tensors, provenance, notes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def save_full_clip(full_clip: FullCLIP, path: str | os.PathLike, *, dtype: str | None = None) -> Path:
    """Write a full CLIP under OpenAI's names (GmP's for one in GmP form) with its architecture in the metadata.

    `dtype` is fp16, bf16 or fp32; None keeps each tensor's own. The file is read back and compared before it takes
    its place. Raises `UserError`.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    tensors = cast(full_clip.state_dict, dtype, path)
    return write_safetensors(tensors, path, file_metadata(full_clip))


def file_metadata(full_clip: FullCLIP) -> dict[str, str]:
    """What a full CLIP's file says about itself beside the tensors (design of the file: README, "Files")."""
    about = {
        "architecture": full_clip.architecture.as_dict(),
        "activation": full_clip.architecture.activation,
        "parameterization": full_clip.parameterization,
        "provenance": dict(full_clip.provenance),
        # What was done on the way here is history; what had to be assumed stays true of the file.
        "notes": [note for note in full_clip.notes if is_assumption(note)],
    }
    return {"format": "pt", METADATA_KEY: json.dumps(about)}


def cast(tensors: Mapping[str, Tensor], dtype: str | None, path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in fp16, bf16 or fp32 (None: as they are); refuses values that would become infinite."""
    if dtype is None:
        return dict(tensors)
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known; choose fp16, bf16 or fp32.")
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.to(DTYPES[dtype])
        if dtype == "fp16" and not torch.isfinite(result[name]).all() and torch.isfinite(tensor).all():
            raise UserError(f"{path} was not written: {name} holds values too large for fp16; choose bf16 or fp32.")
    return result


def kind_of(tensor_names: Iterable[str]) -> str:
    """What a file with these names is: full_clip, text_encoder, vision_encoder, training_state or unknown."""
    found = set(tensor_names)
    if any(name.startswith("optimizer.") for name in found):
        return "training_state"
    text = any(name.endswith(("token_embedding.weight",)) for name in found)
    vision = any(name.startswith(("visual.", "vision_model.")) or name.startswith("module.visual.") for name in found)
    if text and vision:
        return "full_clip"
    return "text_encoder" if text else "vision_encoder" if vision else "unknown"


def find_file(source: str | os.PathLike) -> tuple[Path, Activation | None]:
    """The file behind a path, a folder or a name, and the activation where the name tells it."""
    path = Path(source)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise UserError(f"{source} is a folder without a model.safetensors in it; give the path of a model file.")
        return path / "model.safetensors", None
    if not path.exists() and path.suffix:
        raise UserError(f"{source} does not exist; give the path of a model file.")
    if path.exists():
        return path, None
    model, slash, tag = str(source).replace("\\", "/").partition("/")
    if not slash or "/" in tag:
        raise UserError(f"{source} does not exist; give a model file or a name such as ViT-L-14/openai.")
    return _download(model, tag)


def _download(model: str, tag: str) -> tuple[Path, Activation]:
    import open_clip

    pretrained, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    if not pretrained or not config:
        raise UserError(
            f"{model}/{tag} is neither a file nor a model that open_clip knows; the best known is ViT-L-14/openai."
        )
    try:
        file = open_clip.download_pretrained(pretrained)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{model}/{tag} could not be downloaded ({str(error).splitlines()[0]}); check the network, "
            "or put the model's .safetensors file on disk and choose that."
        ) from error
    quick = pretrained.get("quick_gelu", False) or config.get("quick_gelu", False)
    return Path(file), "quick_gelu" if quick else "gelu"


def _our_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        ours = json.loads(metadata[METADATA_KEY])
        if (
            isinstance(ours["architecture"], dict)
            and isinstance(ours.get("provenance", {}), dict)
            and isinstance(ours.get("notes", []), list)
        ):
            return ours
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} has damaged metadata under {METADATA_KEY}; save the model again or use another file.")


def _hf_config(path: Path) -> dict[str, Any] | None:
    """Activation and heads from the `config.json` of a Hugging Face CLIP beside the file."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None  # some other program's file
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        return None
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    # Hugging Face leaves out what equals its defaults, which are those of ViT-B/32.
    return {
        "activation": text.get("hidden_act", "quick_gelu"),
        "heads": (vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)),
    }


def _to_openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kind = kind_of(tensors)
    if kind != "full_clip":
        raise UserError(
            {
                "text_encoder": "this is a text encoder only; merge it into a full CLIP first "
                "(MergeTEWithVision, or clip-finetune merge).",
                "vision_encoder": "this is a vision encoder only; a full CLIP has a text tower too.",
                "training_state": "this is the saved state of a training run; open best.safetensors beside it.",
            }.get(kind, "this is not a CLIP: it has neither a text tower nor a vision tower.")
        )
    tensors = names.unwrapped(tensors)
    if any(name.startswith("text_model.") for name in tensors):
        try:
            tensors = names.from_hf(tensors)
        except KeyError as error:
            raise UserError(f"this is not a full CLIP: the tensor {error.args[0]} is missing.") from error
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise UserError(f"the tensor {odd[0]} holds {tensors[odd[0]].dtype}, which is not a weight.")
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    return dict(tensors)
