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
from ..files import write_safetensors
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
from .health import BROKEN_MERGE, made_by_a_broken_merge
from .sources import find_model_source
from .tensor_files import read_contents
from .variants.long_clip import LONG_CONTEXT, stretch_context, with_one_table

METADATA_KEY = "clip_finetune"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MIXED = "mixed"
_NO_CURE = "The real out_proj is lost: training cannot bring it back. Use the model that it was made from."


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
        return fingerprint_of(self.architecture, self.state_dict)

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


def fingerprint_of(architecture: Architecture, tensors: Mapping[str, Tensor]) -> str:
    """A hash of an architecture and of some tensors' names, dtypes and bits."""
    digest = hashlib.sha256(json.dumps(architecture.as_dict(), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_full_clip(
    source: str | os.PathLike,
    *,
    activation: Activation | str = "auto",
    context_length: int | None = None,
    in_memory: bool = False,
) -> FullCLIP:
    """Open a full CLIP: a file of any program's making, a folder, or a name such as `ViT-L-14/openai`.

    Tensors are memory-mapped unless `in_memory` (all but those of torch's old format): while a model is in use, its
    file may be replaced (not so on Windows) but not written into. `activation` overrides what the file says or what
    would be assumed. `context_length` 248 stretches a model that reads 77 tokens. Names download from the hub. Nothing
    in a file is executed. Raises `UserError`.
    """
    if activation not in ("auto", "quick_gelu", "gelu"):
        raise UserError(f"The activation {activation!r} is not known; choose auto, quick_gelu or gelu.")
    if context_length not in (None, LONG_CONTEXT):
        raise UserError(f"The context length {context_length} is not known; leave it out, or choose {LONG_CONTEXT}.")
    found = find_model_source(source)
    contents = read_contents(found.path, in_memory=in_memory)
    ours = our_metadata(contents.metadata, found.path)
    try:
        tensors = _to_openai_names(contents.tensors)
        chosen = None if activation == "auto" else activation
        if ours is not None:
            said = ours["architecture"] | {"activation": chosen or ours.get("activation")}
            architecture, notes = Architecture.from_dict(said), tuple(ours.get("notes", ()))
            notes = tuple(note for note in notes if not (chosen and note == ASSUMED_ACTIVATION))
        else:
            architecture, notes = architecture_from_shapes(
                {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                activation=chosen,
                told=contents.told,
                beside=found.told,
            )
        provenance = {"source": found.path.name, **((ours or {}).get("provenance") or {})}
        broken = (f"{found.path.name} {BROKEN_MERGE} {_NO_CURE}",) if made_by_a_broken_merge(tensors) else ()
        full_clip = FullCLIP(architecture, tensors, provenance, (*notes, *contents.notes, *broken))
        return stretch_context(full_clip) if context_length else full_clip
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def save_full_clip(full_clip: FullCLIP, path: str | os.PathLike, *, dtype: str | None = None) -> Path:
    """Write a full CLIP under OpenAI's names (GmP's for one in GmP form) with its architecture in the metadata.

    `dtype` is fp16, bf16, fp32 or mixed; None keeps each tensor's own. The file is read back and compared before it
    takes its place. Raises `UserError`.
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
    """The tensors in fp16, bf16 or fp32 (None: as they are); refuses values that would become infinite.

    `mixed` is OpenAI's own layout, for tensors under OpenAI's names: fp16, but norms, embeddings and `logit_scale` (and
    GmP's lengths and directions) in fp32.
    """
    if dtype is None:
        return dict(tensors)
    if dtype != MIXED and dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known; choose fp16, bf16, fp32 or mixed.")
    result = {}
    for name, tensor in tensors.items():
        to = DTYPES[dtype] if dtype != MIXED else torch.float32 if _fp32_in_openais(name) else torch.float16
        result[name] = tensor.to(to)
        if to == torch.float16 and not torch.isfinite(result[name]).all() and torch.isfinite(tensor).all():
            raise UserError(f"{path} was not written: {name} holds values too large for fp16; choose bf16 or fp32.")
    return result


def _fp32_in_openais(name: str) -> bool:
    norms = ("ln_", "bn", "downsample.1")
    return (
        name == "logit_scale"
        or name.endswith(("_embedding", "token_embedding.weight", ".r", ".theta"))
        or any(part.startswith(norms) for part in name.replace("downsample.1", "bn").split("."))
    )


def kind_of(tensor_names: Iterable[str]) -> str:
    """What a file with these names is: full_clip, text_encoder, vision_encoder, checkpoint (of an image model), lora,
    training_state or unknown."""
    found = names.unwrapped(dict.fromkeys(tensor_names))
    if any(name.startswith("optimizer.") for name in found):
        return "training_state"
    if any(name.startswith(("diffusion_model.", "model.diffusion_model.", "double_blocks.")) for name in found):
        return "checkpoint"
    if any(name.startswith("lora_") or ".lora_" in name for name in found):
        return "lora"
    text = any(name.endswith("token_embedding.weight") for name in found)
    vision = any(name.startswith(("visual.", "vision_model.")) for name in found)
    rest_of_text = any(name.startswith(("text_model.", "transformer.resblocks.")) for name in found)
    if vision and (text or rest_of_text):
        return "full_clip"
    return "text_encoder" if text else "vision_encoder" if vision else "unknown"


def our_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What `file_metadata` wrote into a file, or None in one of another program's; raises `UserError` if damaged."""
    if METADATA_KEY not in metadata:
        return None
    try:
        ours = json.loads(metadata[METADATA_KEY])
        if (
            isinstance(ours["architecture"], dict)
            and isinstance(provenance := ours.get("provenance", {}), dict)
            and isinstance(provenance.get("history", []), list)
            and isinstance(notes := ours.get("notes", []), list)
            and all(isinstance(note, str) for note in notes)
        ):
            return ours
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} has damaged metadata under {METADATA_KEY}; save the model again or use another file.")


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


def _to_openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kind = kind_of(tensors)
    if kind != "full_clip":
        raise UserError(_OTHER_KINDS[kind])
    try:
        tensors = names.to_openai(tensors)
    except KeyError as error:
        raise UserError(
            f"this is not a full CLIP: the tensor {error.args[0]} is missing; get the file anew."
        ) from error
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in names.WEIGHT_DTYPES]
    if odd:
        raise UserError(
            f"the tensor {odd[0]} holds {tensors[odd[0]].dtype}, which is not a weight; use the fp16 or fp32 file of "
            "this model."
        )
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    return with_one_table(tensors)
