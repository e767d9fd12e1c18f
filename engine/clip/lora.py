"""The difference between two text towers as a LoRA file, which ComfyUI's own LoraLoader applies to a CLIP.

For a matrix [out, in], a LoRA holds `lora_up.weight` [out, r], `lora_down.weight` [r, in] and `alpha`, and adds
up · down · alpha / r (Hu et al. 2021, arXiv:2106.09685; the names are kohya's). It holds the six matrices of each
block; biases, norms, positions and token embeddings are left out.

Who reads these names (from the sources, 2025 and 2026):

* ComfyUI 0.33 takes `lora_te1_` for the CLIP-L of SD1.5, SDXL, SD3 and Flux alike, and `lora_te2_` for a CLIP-G
  beside a CLIP-L. Forge does the same.
* A1111 takes the same names for SD1.5 and SDXL, and diffusers (0.42) takes both.
* kohya's sd-scripts take `lora_te1_` for SDXL only (for SD1.5 it is `lora_te_` there).

ComfyUI would also take the rest: biases as `diff_b`, the others under names of its own. But diffusers refuses a whole
file for one `diff_b`, and Forge for a dozen unknown names, so they stay out; the report says what that costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import AnyPath
from ..notes import Notes
from .architecture import Architecture
from .encoders import CLIP_G, text_encoder_state_dict, text_sizes
from .full_clip import FullCLIP
from .tensor_files import DTYPES, cast, require_safetensors_path, write_safetensors

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
# The largest relative error of a conversion to GmP and back in fp32: 2 units in the last place.
_SAME = 2.0**-22
_WHOLE = "export the whole text encoder instead (ExportClipL or ExportClipG; clip-finetune export)"


class EnergyShare(NamedTuple):
    """One kind of tensor: its share of the whole difference, and how much of the whole the LoRA keeps in it."""

    share: float
    kept: float


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """How much of the difference between two text towers a LoRA keeps, from 0 to 1.

    Measured as energy, 1 − ‖difference − LoRA‖² / ‖difference‖², over every tensor of the text tower except its
    projection, which a LoRA cannot carry and hardly any image program reads; with the LoRA's tensors as they are
    written, rounding included. Equal energy does not mean an equal effect on images. `parts` has the kinds of CARRIED
    and LOST; their shares add up to 1 and what they keep to `kept`. `rank` is the one that was used; `notes` are for
    the user.
    """

    rank: int
    kept: float
    parts: Mapping[str, EnergyShare]
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The numbers in words, and what to do if less than half was kept."""
        lost = sorted(((self.parts[kind].share, kind) for kind in LOST), reverse=True)
        listed = [f"{share:.1%} is in {kind}" for share, kind in lost if share >= 0.0005]
        text = f"Rank {self.rank} keeps {self.kept:.1%} of the difference between the two text encoders"
        text += f"; {', '.join(listed)}, which a LoRA cannot carry." if listed else "."
        if self.kept < 0.5:
            uncarried = sum(share for share, _ in lost)
            higher = "choose a higher rank, or " if 1 - uncarried - self.kept > uncarried else ""
            text += f" That is less than half: {higher}{_WHOLE}."
        return text


def export_lora(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    path: AnyPath,
    *,
    rank: int = 32,
    dtype: str = "fp16",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> LoraReport:
    """Write what `full_clip`'s text tower has over `baseline`'s as a LoRA file; it is read back and compared.

    Arguments and errors are those of `lora_state_dict`.
    """
    path = require_safetensors_path(path)
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
    """Return the tensors of the LoRA that turns `baseline`'s text tower into `full_clip`'s, and how well it does.

    `rank` is an upper bound: a matrix whose difference has a lower rank gets that, and a tensor that is the same in
    both is left out. `dtype` is fp16, bf16 or fp32. GmP is folded. `on_progress(done, total)` counts tensors;
    `check_cancelled` is called before each and raises to stop. Raises `UserError` for text towers that differ in size
    or activation or do not differ in any matrix, for weights that are not finite, and for values that `dtype` cannot
    hold.
    """
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known for a LoRA; choose fp16, bf16 or fp32.")
    if rank < 1:
        raise UserError(f"The rank is {rank}; choose 1 or more, such as 32.")
    _require_same_text_sizes(full_clip.architecture, baseline.architecture)
    notes = Notes()
    new = text_encoder_state_dict(full_clip, on_note=notes.add)
    old = _text_of_baseline(baseline)
    _note_coarser_dtype(new, old, notes)
    max_rank = full_clip.architecture.text_width  # of every matrix
    if rank > max_rank:
        notes.add(f"Rank {rank} is more than this text encoder's matrices have; {max_rank} was used.")
        rank = max_rank

    prefix, tensors = lora_prefix(full_clip.architecture), dict[str, Tensor]()
    energy, kept = dict.fromkeys(CARRIED + LOST, 0.0), dict.fromkeys(CARRIED + LOST, 0.0)
    compared = [(name, kind) for name in new if (kind := _kind(name))]
    for done, (name, kind) in enumerate(compared):
        check_cancelled()
        on_progress(done, len(compared))
        difference = _difference(new[name], old[name])
        if difference is None:
            continue
        energy[kind] += _energy(difference)
        if kind in CARRIED:
            factors, missed = _factorise(lora_name(prefix, name), difference, rank, dtype)
            kept[kind] += _energy(difference) - _energy(missed)
            tensors |= factors
    on_progress(len(compared), len(compared))
    return tensors, _report(rank, energy, kept, notes)


def lora_prefix(architecture: Architecture) -> str:
    """Return what the names begin with: `lora_te2_` for a CLIP-G's text tower (SDXL's second), else `lora_te1_`."""
    return "lora_te2_" if text_sizes(architecture) == CLIP_G else "lora_te1_"


def lora_name(prefix: str, name: str) -> str:
    """Return the LoRA's name for a layer, from the Hugging Face name of its weight."""
    return prefix + name.rpartition(".")[0].replace(".", "_")


def lora_metadata(architecture: Architecture) -> dict[str, str]:
    """Return the metadata of the file: none for CLIP-L, SDXL for CLIP-G.

    All programs go by the tensors' names. But A1111 takes a LoRA with any metadata for one of SD1.5 and hides it beside
    SDXL, unless it says SDXL; a CLIP-L's fits both.
    """
    return {"ss_base_model_version": "sdxl_base_v1-0"} if lora_prefix(architecture) == "lora_te2_" else {}


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up [out, r] and down [r, in], r ≤ `rank`, whose product is the nearest to matrix [out, in] of that rank.

    This is the truncated singular value decomposition (Eckart and Young 1936), each singular value split evenly, so
    that neither factor is hard to round. It comes from the eigenvectors of the smaller Gram matrix, in half the time of
    a full decomposition. Squaring costs half the digits, so all is in float64, whatever `matrix` is: singular values
    down to 1e-8 of the largest are told apart, and the missed energy is within 1e-13 of the least possible. Directions
    that are zero to float64 are left out.
    """
    is_tall = matrix.shape[0] >= matrix.shape[1]
    tall = matrix.double() if is_tall else matrix.double().t()
    _, eigenvectors = torch.linalg.eigh(tall.t() @ tall)  # ascending eigenvalues
    right = eigenvectors[:, -rank:].flip(1)
    left = tall @ right
    values = torch.linalg.vector_norm(left, dim=0)
    nonzero = values > values.max() * len(tall) * torch.finfo(torch.float64).eps
    root = values[nonzero].sqrt()
    left, right = left[:, nonzero] / root, right[:, nonzero] * root
    up, down = (left, right) if is_tall else (right, left)
    return up, down.t()


def _factorise(name: str, difference: Tensor, rank: int, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the LoRA's tensors for one difference, and what they miss of it in float64 once rounded to `dtype`."""
    up, down = low_rank(difference, rank)
    factors = cast({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, dtype, "The LoRA")
    up, down = (tensor.double() for tensor in factors.values())
    # alpha equal to the rank makes the scale alpha / r one. Always fp32, which holds every rank.
    alpha = torch.tensor(float(len(down)), dtype=torch.float32)
    return factors | {f"{name}.alpha": alpha}, difference - up @ down


def _report(rank: int, energy: Mapping[str, float], kept: Mapping[str, float], notes: Notes) -> LoraReport:
    """Turn sums of squares into shares; raise `UserError` if there is nothing that a LoRA could carry."""
    whole = sum(energy.values())
    if whole == 0:
        raise UserError(
            "The two text encoders are the same, so there is no difference to export; choose a model whose text tower "
            "was trained, and as baseline the model that its training began from."
        )
    if not any(energy[kind] for kind in CARRIED):
        kinds = " and ".join(kind for kind in LOST if energy[kind])
        raise UserError(f"The two text encoders differ only in {kinds}, which a LoRA cannot carry; {_WHOLE}.")
    parts = {kind: EnergyShare(energy[kind] / whole, kept[kind] / whole) for kind in energy}
    return LoraReport(rank, sum(part.kept for part in parts.values()), MappingProxyType(parts), tuple(notes))


def _kind(name: str) -> str | None:
    """Return the kind of tensor behind a Hugging Face name; None for the projection."""
    if "embedding.weight" in name:
        return "token embeddings" if "token_embedding" in name else "positions"
    if "norm" in name:
        return "layer norms"
    if not name.startswith("text_model."):
        return None
    return "biases" if name.endswith(".bias") else "attention" if ".self_attn." in name else "MLP"


def _difference(new: Tensor, old: Tensor) -> Tensor | None:
    """Return new − old in float64; None if no element differs by more than a conversion to GmP and back changes it."""
    if torch.allclose(new.float(), old.float(), rtol=_SAME, atol=0):
        return None
    return new.double().sub_(old)


def _energy(difference: Tensor) -> float:
    """Return the sum of squares of a float64 tensor."""
    return torch.linalg.vector_norm(difference).item() ** 2


def _require_same_text_sizes(new: Architecture, old: Architecture) -> None:
    """Raise `UserError` unless both text towers have the same sizes and activation; the rest may differ."""
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


def _text_of_baseline(baseline: FullCLIP) -> dict[str, Tensor]:
    try:
        return text_encoder_state_dict(baseline)
    except UserError as error:
        raise UserError(f"baseline: {error}") from error


def _note_coarser_dtype(new: Mapping[str, Tensor], old: Mapping[str, Tensor], notes: Notes) -> None:
    """Note if the model is stored with fewer digits than its baseline: that rounding counts as difference."""
    name = "text_model.final_layer_norm.bias"
    dtype, baseline_dtype = new[name].dtype, old[name].dtype
    if torch.finfo(dtype).eps > torch.finfo(baseline_dtype).eps:
        notes.add(
            f"The model is stored as {str(dtype).removeprefix('torch.')} and its baseline as "
            f"{str(baseline_dtype).removeprefix('torch.')}: what the rounding changed counts as difference too. Use a "
            "model that was saved with the baseline's dtype to leave that out."
        )
