"""The difference between two text towers as a LoRA file, which ComfyUI's own LoraLoader applies to a CLIP.

A LoRA holds `lora_up.weight` [out, r], `lora_down.weight` [r, in] and `alpha` for a matrix [out, in], and stands for
up · down · alpha / r (Hu et al. 2021, arXiv:2106.09685; the names are kohya's). The six matrices of each block are
carried so; biases, norms, positions and token embeddings are not.

Who reads these names (from the sources, 2025 and 2026):

* ComfyUI 0.33 takes `lora_te1_` for the CLIP-L of SD1.5, SDXL, SD3 and Flux alike, and `lora_te2_` for a CLIP-G that
  stands beside a CLIP-L. Forge does the same.
* A1111 takes the same names for SD1.5 and SDXL, and diffusers (0.42) takes both.
* kohya's sd-scripts take `lora_te1_` for SDXL only (for SD1.5 it is `lora_te_` there).

ComfyUI would take all the rest too, biases as `diff_b` and the others under names of its own. But diffusers refuses a
whole file for one `diff_b`, and Forge for a dozen names that it does not know, so they stay out; the report says what
that costs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from .architecture import Architecture
from .exports import CLIP_G, text_encoder_state_dict, text_sizes
from .full_clip import DTYPES, FullCLIP, cast

CARRIED = ("attention", "MLP")
LOST = ("token embeddings", "positions", "layer norms", "biases")
_TEXT_FIELDS = (
    "text_width",
    "text_layers",
    "text_heads",
    "text_mlp_width",
    "vocab_size",
    "context_length",
    "activation",
)
# No element is further off after a conversion to GmP and back in fp32: 2 units in the last place.
_SAME = 2.0**-22
_WHOLE = "export the whole text encoder instead (ExportClipL or ExportClipG; clip-finetune export)"


class Part(NamedTuple):
    """One kind of tensor: its share of the whole difference, and what the LoRA keeps of it, also of the whole."""

    share: float
    kept: float


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """How much of the difference between two text towers a LoRA keeps, from 0 to 1.

    Counted as energy: 1 − ‖difference − LoRA‖² / ‖difference‖², over every tensor of the text tower but its projection,
    which a LoRA cannot carry and hardly any image program reads; with the LoRA's tensors as they are written, rounding
    included. Equal energy does not mean equal effect on pictures. `parts` has the kinds of CARRIED and LOST; their
    shares add up to 1 and what they keep to `kept`. `rank` is the one that was used; `notes` are for the user.
    """

    rank: int
    kept: float
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The numbers in words, with a way out if less than half was kept."""
        lost = sorted(((self.parts[kind].share, kind) for kind in LOST), reverse=True)
        told = [f"{share:.1%} is in {kind}" for share, kind in lost if share >= 0.0005]
        text = f"Rank {self.rank} keeps {self.kept:.1%} of the difference between the two text encoders"
        text += f"; {', '.join(told)}, which a LoRA cannot carry." if told else "."
        if self.kept < 0.5:
            uncarried = sum(share for share, _ in lost)
            higher = "choose a higher rank, or " if 1 - uncarried - self.kept > uncarried else ""
            text += f" That is less than half: {higher}{_WHOLE}."
        return text


def export_lora(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    path: str | os.PathLike,
    *,
    rank: int = 32,
    dtype: str = "fp16",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> LoraReport:
    """Write what `full_clip`'s text tower has over `baseline`'s as a LoRA file; it is read back and compared.

    Takes what `lora_state_dict` takes, and raises what it raises.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    tensors, report = lora_state_dict(
        full_clip, baseline, rank=rank, dtype=dtype, on_progress=on_progress, check_cancelled=check_cancelled
    )
    write_safetensors(tensors, path, lora_metadata(full_clip.architecture))
    return report


def lora_state_dict(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    *,
    rank: int = 32,
    dtype: str = "fp16",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], LoraReport]:
    """The tensors of the LoRA that turns `baseline`'s text tower into `full_clip`'s, and how well it does.

    `rank` is at most what a matrix has; one whose difference has a lower rank gets that, and a tensor that is the same
    in both is left out. `dtype` is fp16, bf16 or fp32. GmP is folded. `on_progress(done, total)` counts tensors;
    `check_cancelled` is called before each and raises to stop. Raises `UserError` for text towers that differ in size
    or activation or do not differ in any matrix, for weights that are not finite, and for values that `dtype` cannot
    hold.
    """
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known for a LoRA; choose fp16, bf16 or fp32.")
    if rank < 1:
        raise UserError(f"The rank is {rank}; choose 1 or more, such as 32.")
    _require_one_text_tower(full_clip.architecture, baseline.architecture)
    new, notes = text_encoder_state_dict(full_clip)
    old = _baseline_text(baseline)
    notes += _coarser(new, old)
    highest = full_clip.architecture.text_width  # no matrix has a higher rank
    if rank > highest:
        notes.append(f"Rank {rank} is more than this text encoder's matrices have; {highest} was used.")
        rank = highest

    prefix, tensors = lora_prefix(full_clip.architecture), {}
    energy, kept = dict.fromkeys(CARRIED + LOST, 0.0), dict.fromkeys(CARRIED + LOST, 0.0)
    compared = [name for name in new if _kind(name) is not None]
    for done, name in enumerate(compared):
        check_cancelled()
        on_progress(done, len(compared))
        kind, difference = _kind(name), _difference(new[name], old[name])
        if difference is None:
            continue
        size = _energy(difference)
        energy[kind] += size
        if kind in CARRIED:
            carried, missed = _carry(lora_name(prefix, name), difference, rank, dtype)
            kept[kind] += size - _energy(missed)
            tensors |= carried
    on_progress(len(compared), len(compared))
    return tensors, _report(rank, energy, kept, notes)


def lora_prefix(architecture: Architecture) -> str:
    """What the names begin with: `lora_te2_` for the text tower of a CLIP-G (SDXL's second), else `lora_te1_`."""
    return "lora_te2_" if text_sizes(architecture) == CLIP_G else "lora_te1_"


def lora_name(prefix: str, name: str) -> str:
    """The LoRA's name for a layer, from the Hugging Face name of its weight."""
    return prefix + name.rpartition(".")[0].replace(".", "_")


def lora_metadata(architecture: Architecture) -> dict[str, str]:
    """The metadata of the file: none for CLIP-L, SDXL for CLIP-G.

    No program needs any: all go by the tensors' names. A1111 takes a LoRA with any metadata for one of SD1.5 and hides
    it beside SDXL, unless it says SDXL; a CLIP-L's fits both.
    """
    return {"ss_base_model_version": "sdxl_base_v1-0"} if lora_prefix(architecture) == "lora_te2_" else {}


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, in], r ≤ `rank`, whose product is as near to matrix [out, in] as that rank allows.

    This is the truncated singular value decomposition (Eckart and Young 1936), each singular value split evenly, so
    that neither factor is hard to round. It comes from the eigenvectors of the smaller Gram matrix, in half the time of
    a full decomposition. Squaring costs half the digits, so all is in float64, whatever `matrix` is: singular values
    down to 1e-8 of the largest are told apart, and what is missed in energy is within 1e-13 of the least possible.
    Directions that are zero to float64 are left out.
    """
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().t()
    _, vectors = torch.linalg.eigh(tall.t() @ tall)  # from the smallest
    right = vectors[:, -rank:].flip(1)
    left = tall @ right
    values = torch.linalg.vector_norm(left, dim=0)
    found = values > values.max() * len(tall) * torch.finfo(torch.float64).eps
    root = values[found].sqrt()
    left, right = left[:, found] / root, right[:, found] * root
    up, down = (left, right) if matrix.shape[0] >= matrix.shape[1] else (right, left)
    return up, down.t()


def _carry(name: str, difference: Tensor, rank: int, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """The LoRA's tensors for one difference, and what they miss of it in float64 once they are rounded to `dtype`."""
    up, down = low_rank(difference, rank)
    factors = cast({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, dtype, "The LoRA")
    up, down = (tensor.double() for tensor in factors.values())
    # Always fp32, which holds every rank. Equal to the rank, it makes the scale alpha / r one.
    alpha = torch.tensor(float(len(down)), dtype=torch.float32)
    return factors | {f"{name}.alpha": alpha}, difference - up @ down


def _report(rank: int, energy: Mapping[str, float], kept: Mapping[str, float], notes: list[str]) -> LoraReport:
    """Shares from sums of squares; raises `UserError` if there is nothing that a LoRA could carry."""
    whole = sum(energy.values())
    if whole == 0:
        raise UserError(
            "The two text encoders are the same, so there is no difference to export; choose a model whose text tower "
            "was trained, and as baseline the model that its training began from."
        )
    if not any(energy[kind] for kind in CARRIED):
        kinds = " and ".join(kind for kind in LOST if energy[kind])
        raise UserError(f"The two text encoders differ only in {kinds}, which a LoRA cannot carry; {_WHOLE}.")
    parts = {kind: Part(energy[kind] / whole, kept[kind] / whole) for kind in energy}
    return LoraReport(rank, sum(part.kept for part in parts.values()), MappingProxyType(parts), tuple(notes))


def _kind(name: str) -> str | None:
    """The kind of tensor behind a Hugging Face name; None for the projection."""
    if "embedding.weight" in name:
        return "token embeddings" if "token_embedding" in name else "positions"
    if "norm" in name:
        return "layer norms"
    if not name.startswith("text_model."):
        return None
    return "biases" if name.endswith(".bias") else "attention" if ".self_attn." in name else "MLP"


def _difference(new: Tensor, old: Tensor) -> Tensor | None:
    """new − old in float64; None if no element differs by more than a conversion to GmP and back may change it."""
    if torch.allclose(new.float(), old.float(), rtol=_SAME, atol=0):
        return None
    return new.double().sub_(old)


def _energy(difference: Tensor) -> float:
    """The sum of squares of a float64 tensor."""
    return torch.linalg.vector_norm(difference).item() ** 2


def _require_one_text_tower(new: Architecture, old: Architecture) -> None:
    """Raise `UserError` unless both text towers are of the same sizes and activation; the rest may differ."""
    different = [
        f"{name} {getattr(new, name)} and {getattr(old, name)}"
        for name in _TEXT_FIELDS
        if getattr(new, name) != getattr(old, name)
    ]
    if different:
        raise UserError(
            f"The two models have different text towers ({', '.join(different)}), so no LoRA leads from one to the "
            "other; choose as baseline the model that the training began from."
        )


def _baseline_text(baseline: FullCLIP) -> dict[str, Tensor]:
    try:
        return text_encoder_state_dict(baseline)[0]
    except UserError as error:
        raise UserError(f"baseline: {error}") from error


def _coarser(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> list[str]:
    """A note if the model is stored with fewer digits than its baseline: that rounding counts as difference."""
    name = "text_model.final_layer_norm.bias"
    if torch.finfo(new[name].dtype).eps <= torch.finfo(old[name].dtype).eps:
        return []
    return [
        f"The model is stored as {str(new[name].dtype).removeprefix('torch.')} and its baseline as "
        f"{str(old[name].dtype).removeprefix('torch.')}: what the rounding changed counts as difference too. Use a "
        "model that was saved with the baseline's dtype to leave that out."
    ]
