"""How far a model has moved from its baseline: in its weights, and in the hidden states that image models read."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clip import names
from ..clip.architecture import Architecture
from ..clip.encoders import CLIP_G, CLIP_L, text_sizes
from ..clip.full_clip import FullCLIP
from ..clip.gmp import gmp_to_weight
from ..errors import UserError
from ..openai import END
from .encoder import BATCH, BrokenModel, Encoder, ignore_progress, never_cancelled

MAX_PROMPTS = 256  # the baseline's states for all of them are held in memory
PROMPTS = (
    "",
    "a photo of a cat",
    "a red apple on a wooden table",
    "portrait of an old fisherman, natural light, 85mm lens",
    "a watercolor painting of a village by the sea at sunset",
    "two children playing chess in a park",
    "an astronaut riding a horse on the moon, cinematic lighting",
    "a blue car next to a yellow truck",
    "close-up of a bee on a sunflower, macro photography, shallow depth of field",
    'a neon sign that says "open" above a small shop at night',
    "a castle on a hill under a stormy sky, digital art, highly detailed",
    "three green bottles and one broken glass on a shelf",
    "1girl, solo, long hair, blue eyes, school uniform, smile, outdoors, cherry blossoms",
    "a corgi wearing sunglasses and a hat, studio photo, white background",
    "isometric view of a tiny city inside a glass jar, soft colors",
    "black and white photograph of a steam train crossing a bridge",
    "a bowl of ramen with egg, seaweed and sliced pork, top view",
    "an oil painting of a woman reading a letter by a window, in the style of the Dutch golden age",
    "a dragon made of ice flying over a frozen lake with mountains in the background",
    "blurry, low quality, watermark, text, extra fingers, deformed",
    "minimalist logo of a fox, flat vector, orange and white",
    "a crowded street market in Bangkok with food stalls, umbrellas and motorbikes, late afternoon sun, a woman in a "
    "yellow raincoat buying mangoes, steam rising from pots, signs in many languages, wires overhead, wide-angle lens",
)
# What each image model reads of each text tower, as ComfyUI's loaders stand in 2026.
READERS = {
    CLIP_L: {"penultimate": "SDXL, SD3", "last": "SD1.5", "pooled": "Flux, SD3, HunyuanVideo"},
    CLIP_G: {"penultimate": "SDXL, SD3", "projected": "SDXL, SD3"},
}
STATES = {
    "penultimate": "before the last block",
    "last": "last, with the final norm",
    "pooled": "at the end token, with the final norm",
    "projected": "at the end token, projected",
}
POSITIONS = ("start", "words", "end", "padding")
_CHUNK = 2**22  # values of a tensor that are in float64 at once
_BLOCK = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.")
_STAGE = re.compile(r"visual\.layer(\d+)\.(\d+)\.")


def require_one_architecture(full_clip: FullCLIP, baseline: FullCLIP) -> None:
    """Raise `UserError` unless both are CLIPs of the same sizes and activation."""
    new, old = full_clip.architecture.as_dict(), baseline.architecture.as_dict()
    different = [f"{name} {value} and {old[name]}" for name, value in new.items() if value != old[name]]
    if different:
        raise UserError(
            f"The model and its baseline are different kinds of CLIP ({', '.join(different)}), so they cannot be "
            "compared weight by weight; choose as baseline the model that the training started from."
        )


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """‖W − W₀‖ / ‖W₀‖ (Frobenius) of all tensors of a layer together; `depth` is a block's index in its tower."""

    tower: str
    layer: str
    depth: int | None
    drift: float


@dataclasses.dataclass(frozen=True)
class WeightDrift:
    """Relative change of plain weights (a GmP model is folded first), by layer and for each tower.

    `logit_scale` is the factor itself, before and after.
    """

    layers: tuple[LayerDrift, ...]
    vision: float
    text: float
    logit_scale: tuple[float, float]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "vision": self.vision,
            "text": self.text,
            "logit_scale": list(self.logit_scale),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }


class _Layer(NamedTuple):
    tower: str
    name: str
    depth: int | None


def weight_drift(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    *,
    on_progress: Callable[[int, int], None] = ignore_progress,
    check_cancelled: Callable[[], None] = never_cancelled,
) -> WeightDrift:
    """Compare weights in float64, one tensor at a time.

    Raises `UserError` for two architectures and `BrokenModel` for weights that are not finite.
    """
    require_one_architecture(full_clip, baseline)
    energies: dict[_Layer, tuple[float, float]] = {}
    before = dict(_plain_weights(baseline))
    for done, (name, weight) in enumerate(_plain_weights(full_clip)):
        check_cancelled()
        on_progress(done, len(before))
        if name == "logit_scale":
            continue
        layer = _layer_of(name)
        moved, size = _energies(weight(), before[name](), name)
        moved_so_far, size_so_far = energies.get(layer, (0.0, 0.0))
        energies[layer] = (moved_so_far + moved, size_so_far + size)
    on_progress(len(before), len(before))
    order = sorted(energies, key=lambda layer: (layer.tower == "text", layer.depth is None, layer.depth or 0))

    def tower_drift(tower: str) -> float:
        moved, size = zip(*(energies[layer] for layer in order if layer.tower == tower), strict=True)
        return _relative(sum(moved), sum(size))

    old_scale, new_scale = (model.state_dict["logit_scale"].double().exp().item() for model in (baseline, full_clip))
    layers = tuple(LayerDrift(*layer, _relative(*energies[layer])) for layer in order)
    return WeightDrift(layers, tower_drift("vision"), tower_drift("text"), (old_scale, new_scale))


def _plain_weights(full_clip: FullCLIP) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield each name with a function that returns its plain weight, so that only one layer is folded at a time."""
    state = full_clip.state_dict
    for name in state:
        layer, _, kind = name.rpartition(".")
        if kind == "theta":
            r, theta, bias = (state[f"{layer}.{part}"] for part in ("r", "theta", "bias"))
            yield f"{layer}.weight", functools.partial(gmp_to_weight, r, theta, bias.dtype)
        elif kind != "r":
            yield name, functools.partial(state.__getitem__, name)


def _energies(new: Tensor, old: Tensor, name: str) -> tuple[float, float]:
    """Return (‖new − old‖², ‖old‖²), summed in float64."""
    new, old, moved, size = new.reshape(-1), old.reshape(-1), 0.0, 0.0
    for start in range(0, len(new), _CHUNK):
        x, y = new[start : start + _CHUNK].double(), old[start : start + _CHUNK].double()
        size += y.square().sum().item()
        moved += (x - y).square_().sum().item()
    if not math.isfinite(moved + size):
        raise BrokenModel(
            f"{name} holds values that are not numbers (NaN or infinite) in the model or its baseline; use an earlier "
            "checkpoint."
        )
    return moved, size


def _relative(moved: float, size: float) -> float:
    """Return 1 for a layer that was all zeros and no longer is."""
    return math.sqrt(moved / size) if size else float(moved > 0)


def _layer_of(name: str) -> _Layer:
    tower = "vision" if names.is_vision_name(name) else "text"
    if block := _BLOCK.match(name):
        return _Layer(tower, f"block {int(block[1]) + 1}", int(block[1]))
    if stage := _STAGE.match(name):
        return _Layer(tower, f"stage {stage[1]}, block {int(stage[2]) + 1}", 1000 * int(stage[1]) + int(stage[2]))
    if "token_embedding" in name:
        return _Layer(tower, "token embeddings", None)
    if "positional_embedding" in name or "class_embedding" in name:
        return _Layer(tower, "positions", None)
    if name in ("visual.proj", "text_projection"):
        return _Layer(tower, "projection", None)
    return _Layer(tower, "norms outside the blocks" if "ln_" in name else "input layers", None)


# ---- hidden states ---------------------------------------------------------------------------------------------------


class PositionDrift(NamedTuple):
    """Means over positions of the cosine of the two states and of ‖h − h₀‖ / ‖h₀‖."""

    cosine: float
    relative_l2: float
    positions: int


@dataclasses.dataclass(frozen=True)
class ConditioningDrift:
    """How far the hidden states that image models read have moved.

    `states[state][position]` has the states in `STATES`; pooled ones have the position "end" alone. `readers[state]`
    names the image models that read it.
    """

    prompts: int
    states: Mapping[str, Mapping[str, PositionDrift]]
    readers: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest relative L2 at word and end tokens."""
        return max(
            drift.relative_l2
            for positions in self.states.values()
            for position, drift in positions.items()
            if position in ("words", "end")
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "states": {
                state: {"read_by": self.readers[state]}
                | {position: drift._asdict() for position, drift in positions.items()}
                for state, positions in self.states.items()
            },
        }


def conditioning_drift(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    prompts: Sequence[str] = PROMPTS,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = ignore_progress,
    check_cancelled: Callable[[], None] = never_cancelled,
) -> ConditioningDrift:
    """Measure how far the states that SDXL, SD1.5, SD3 and Flux read have moved on prompts with ComfyUI's padding.

    Raises `UserError` for two architectures or no prompt, and `BrokenModel`.
    """
    require_one_architecture(full_clip, baseline)
    prompts, notes = limit_prompts(prompts)
    states = []
    for number, model in enumerate((baseline, full_clip)):
        encoder = Encoder.of(model, device=device, check_cancelled=check_cancelled)
        states.append(read_states(encoder, prompts, model.architecture))
        on_progress(number + 1, 2)
    return compare_states(states[1], states[0], full_clip.architecture, notes)


def limit_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the prompts that are used, and a note if they are not all. Raises `UserError` for none."""
    if not prompts:
        raise UserError("There is no prompt to compare hidden states on; give at least one.")
    if len(prompts) <= MAX_PROMPTS:
        return list(prompts), []
    return list(prompts[:MAX_PROMPTS]), [f"Only the first {MAX_PROMPTS} of {len(prompts)} prompts are used."]


def host_tokens(encoder: Encoder, prompts: Sequence[str], architecture: Architecture) -> Tensor:
    """Return token ids int64 [n, context] as ComfyUI makes them: CLIP-L padded with the end token, CLIP-G with 0.

    A prompt that is too long is cut; ComfyUI would continue it in further windows.
    """
    tokens = encoder.tokenizer(prompts)
    if text_sizes(architecture) != CLIP_G:
        tokens[_position_of(tokens) == POSITIONS.index("padding")] = END
    return tokens


class PromptStates(NamedTuple):
    """`states[name]` float32 [n, context, width] on the CPU, or [n, width] of those at the end token; `positions`
    [n, context] are indices into `POSITIONS`."""

    states: dict[str, Tensor]
    positions: Tensor


def read_states(encoder: Encoder, prompts: Sequence[str], architecture: Architecture) -> PromptStates:
    """Return the states that image models read of these prompts."""
    tokens = host_tokens(encoder, prompts, architecture)
    batches: dict[str, list[Tensor]] = {name: [] for name in _readers(architecture)}
    for start in range(0, len(tokens), BATCH):
        encoder.host.check_cancelled()
        with torch.no_grad(), encoder.autocast():
            batch = hidden_states(encoder.network, tokens[start : start + BATCH].to(encoder.device))
        for name, parts in batches.items():
            parts.append(batch[name].float().cpu())
    states = {name: torch.cat(parts) for name, parts in batches.items()}
    if not all(torch.isfinite(tensor).all() for tensor in states.values()):
        raise BrokenModel(
            "The text tower computes values that are not numbers (NaN or infinite), so its hidden states cannot be "
            "compared. Its weights are damaged, or its training diverged; use an earlier checkpoint."
        )
    return PromptStates(states, _position_of(tokens))


def hidden_states(network: Any, tokens_nl: Tensor) -> dict[str, Tensor]:
    """Return the `STATES` of an open_clip.CLIP; a row's text ends with its first end token."""
    states = network.token_embedding(tokens_nl) + network.positional_embedding[: tokens_nl.shape[1]]
    mask = network.attn_mask[: tokens_nl.shape[1], : tokens_nl.shape[1]]
    before = states
    for block in network.transformer.resblocks:
        before, states = states, block(states, attn_mask=mask)
    last = network.ln_final(states)
    pooled = last[torch.arange(len(last)), (tokens_nl == END).int().argmax(1)]
    return {"penultimate": before, "last": last, "pooled": pooled, "projected": pooled @ network.text_projection}


def compare_states(
    new: PromptStates, old: PromptStates, architecture: Architecture, notes: Sequence[str] = ()
) -> ConditioningDrift:
    """Compare states position by position, in float64."""
    end = POSITIONS.index("end")
    states = {}
    for name, after in new.states.items():
        positions = new.positions if after.ndim == 3 else torch.full((len(after),), end)
        cosines, distances = torch.zeros(positions.shape).double(), torch.zeros(positions.shape).double()
        for row, (x, y) in enumerate(zip(after, old.states[name], strict=True)):
            x, y = x.double(), y.double()
            sizes = (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(1e-300)
            cosines[row] = (x * y).sum(-1) / sizes
            distances[row] = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-300)
        states[name] = {
            position: PositionDrift(cosines[rows].mean().item(), distances[rows].mean().item(), int(rows.sum()))
            for number, position in enumerate(POSITIONS)
            if (rows := positions == number).any()
        }
    if text_sizes(architecture) not in READERS:
        other_sizes = (
            "Image models read a CLIP-L or CLIP-G, and this text tower has other sizes; its hidden states are compared "
            "as if it were a CLIP-L."
        )
        notes = [*notes, other_sizes]
    return ConditioningDrift(len(new.positions), states, _readers(architecture), tuple(notes))


def _readers(architecture: Architecture) -> dict[str, str]:
    return READERS.get(text_sizes(architecture), READERS[CLIP_L])


def _position_of(tokens_nl: Tensor) -> Tensor:
    """Return for each token the index of its position in `POSITIONS`."""
    columns = torch.arange(tokens_nl.shape[1]).expand_as(tokens_nl)
    ends = (tokens_nl == END).int().argmax(1, keepdim=True)
    positions = torch.full_like(tokens_nl, POSITIONS.index("words"))
    positions[columns == 0] = POSITIONS.index("start")
    positions[columns == ends] = POSITIONS.index("end")
    positions[columns > ends] = POSITIONS.index("padding")
    return positions
