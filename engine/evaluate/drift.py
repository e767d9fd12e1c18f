"""How far a model has moved from its baseline: in its weights, and in the hidden states that image models read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..clip import names
from ..clip.architecture import Architecture
from ..clip.encoders import CLIP_G, CLIP_L, text_sizes
from ..clip.full_clip import FullCLIP
from ..clip.gmp import gmp_to_weight
from ..errors import UserError
from ..openai import END
from .encoder import BATCH, BrokenModel, Encoder

# A user's list of prompts is cut to this many: their states of the baseline are kept in memory.
MOST_PROMPTS = 256
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
# What image models read of each text tower, and which ones: ComfyUI's loaders, as they stand in 2026.
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
_CHUNK = 2**22  # numbers of a tensor that are in float64 at once
_BLOCK = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.")
_STAGE = re.compile(r"visual\.layer(\d+)\.(\d+)\.")


def require_one_architecture(full_clip: FullCLIP, baseline: FullCLIP) -> None:
    """Raise `UserError` unless both are CLIPs of the same sizes and activation."""
    new, old = full_clip.architecture.as_dict(), baseline.architecture.as_dict()
    different = [f"{name} {value} and {old[name]}" for name, value in new.items() if value != old[name]]
    if different:
        raise UserError(
            f"The model and its baseline are CLIPs of different kinds ({', '.join(different)}), so they cannot be laid "
            "over each other; choose as baseline the model that the training began from."
        )


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """‖W − W₀‖ / ‖W₀‖ (Frobenius) of all tensors of a layer together; `depth` is a block's place in its tower."""

    tower: str
    layer: str
    depth: int | None
    drift: float


@dataclasses.dataclass(frozen=True)
class WeightDrift:
    """Of plain weights: a model in GmP form counts as it folds. `vision` and `text` are of the whole towers;
    `logit_scale` is the factor itself, before and after."""

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


def weight_drift(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> WeightDrift:
    """Layer by layer, in float64, a tensor at a time. Raises `UserError` for two architectures, `BrokenModel` for
    weights that are not numbers."""
    require_one_architecture(full_clip, baseline)
    energies: dict[tuple[str, str, int | None], tuple[float, float]] = {}
    before = dict(_plain_sources(baseline))
    for done, (name, source) in enumerate(_plain_sources(full_clip)):
        check_cancelled()
        on_progress(done, len(before))
        if name == "logit_scale":
            continue
        place = _place(name)
        moved, size = _energies(source(), before[name](), name)
        so_far = energies.get(place, (0.0, 0.0))
        energies[place] = (so_far[0] + moved, so_far[1] + size)
    on_progress(len(before), len(before))
    order = sorted(energies, key=lambda place: (place[0] == "text", place[2] is None, place[2] or 0))
    towers = {}
    for tower in ("vision", "text"):
        found = [energies[place] for place in order if place[0] == tower]
        towers[tower] = _relative(sum(moved for moved, _ in found), sum(size for _, size in found))
    scales = tuple(model.state_dict["logit_scale"].double().exp().item() for model in (baseline, full_clip))
    layers = tuple(LayerDrift(*place, _relative(*energies[place])) for place in order)
    return WeightDrift(layers, towers["vision"], towers["text"], (scales[0], scales[1]))


def _plain_sources(full_clip: FullCLIP) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, how to get the plain weight), so that no more than one layer is folded at a time."""
    state = full_clip.state_dict
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "theta":
            bias, r = state[f"{layer}.bias"], state[f"{layer}.r"]
            yield f"{layer}.weight", lambda r=r, theta=tensor, to=bias.dtype: gmp_to_weight(r, theta, to)
        elif kind != "r":
            yield name, lambda tensor=tensor: tensor


def _energies(new: Tensor, old: Tensor, name: str) -> tuple[float, float]:
    """(‖new − old‖², ‖old‖²) in float64."""
    new, old, moved, size = new.reshape(-1), old.reshape(-1), 0.0, 0.0
    for start in range(0, len(new), _CHUNK):
        x, y = new[start : start + _CHUNK].double(), old[start : start + _CHUNK].double()
        size += y.square().sum().item()
        moved += (x - y).square_().sum().item()
    if not math.isfinite(moved + size):
        raise BrokenModel(
            f"{name} holds values that are not numbers (NaN or infinite) in the model or its baseline; choose a model "
            "from before its training broke."
        )
    return moved, size


def _relative(moved: float, size: float) -> float:
    """Of a layer that was all zeros, 1 if it is not any more."""
    return math.sqrt(moved / size) if size else float(moved > 0)


def _place(name: str) -> tuple[str, str, int | None]:
    """(tower, layer in words, depth of a block) of a tensor."""
    tower = "vision" if names.is_vision_name(name) else "text"
    if block := _BLOCK.match(name):
        return tower, f"block {int(block[1]) + 1}", int(block[1])
    if stage := _STAGE.match(name):
        return tower, f"stage {stage[1]}, block {int(stage[2]) + 1}", 1000 * int(stage[1]) + int(stage[2])
    if "token_embedding" in name:
        return tower, "token embeddings", None
    if "positional_embedding" in name or "class_embedding" in name:
        return tower, "positions", None
    if name in ("visual.proj", "text_projection"):
        return tower, "projection", None
    return tower, "norms outside the blocks" if "ln_" in name else "input layers", None


# ---- hidden states ---------------------------------------------------------------------------------------------------


class PositionDrift(NamedTuple):
    """Means over positions of the cosine of the two states and of ‖h − h₀‖ / ‖h₀‖."""

    cosine: float
    relative_l2: float
    positions: int


@dataclasses.dataclass(frozen=True)
class ConditioningDrift:
    """`states[state][position]` for the states that image models read (`STATES`), the pooled ones at the end token
    alone; `readers[state]` names those models."""

    prompts: int
    states: Mapping[str, Mapping[str, PositionDrift]]
    readers: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest relative L2 over what is read of words and end tokens."""
        return max(
            found.relative_l2
            for positions in self.states.values()
            for position, found in positions.items()
            if position in ("words", "end")
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "states": {
                state: {"read_by": self.readers[state]}
                | {position: found._asdict() for position, found in positions.items()}
                for state, positions in self.states.items()
            },
        }


def conditioning_drift(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    prompts: Sequence[str] = PROMPTS,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> ConditioningDrift:
    """How far the hidden states that SDXL, SD1.5, SD3 and Flux read have moved on these prompts, with the padding that
    ComfyUI gives them. Raises `UserError` for two architectures or no prompt, and `BrokenModel`."""
    require_one_architecture(full_clip, baseline)
    prompts, notes = chosen_prompts(prompts)
    found = []
    for number, model in enumerate((baseline, full_clip)):
        encoder = Encoder.of(model, device=device, check_cancelled=check_cancelled)
        found.append(read_states(encoder, prompts, model.architecture))
        on_progress(number + 1, 2)
    return compare_states(found[1], found[0], full_clip.architecture, notes)


def chosen_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that are used, and a note if they are not all."""
    if not prompts:
        raise UserError("There is no prompt to compare hidden states on; give one at least.")
    if len(prompts) <= MOST_PROMPTS:
        return list(prompts), []
    return list(prompts[:MOST_PROMPTS]), [f"Of {len(prompts)} prompts the first {MOST_PROMPTS} are used."]


def host_tokens(encoder: Encoder, prompts: Sequence[str], architecture: Architecture) -> Tensor:
    """int64 [n, context]: as ComfyUI makes them, a CLIP-L's padded with the end token and a CLIP-G's with 0.

    Of a prompt that is too long the beginning, which ComfyUI would follow with further chunks.
    """
    tokens = encoder.tokenizer(prompts)
    if text_sizes(architecture) != CLIP_G:
        tokens[_position_of(tokens) == POSITIONS.index("padding")] = END
    return tokens


class PromptStates(NamedTuple):
    """float32 on the CPU: `states[name]` [n, context, width], or [n, width] of those at the end token; `positions`
    [n, context] are indices into `POSITIONS`."""

    states: dict[str, Tensor]
    positions: Tensor


def read_states(encoder: Encoder, prompts: Sequence[str], architecture: Architecture) -> PromptStates:
    """The states that image models read of these prompts."""
    tokens = host_tokens(encoder, prompts, architecture)
    parts = []
    for start in range(0, len(tokens), BATCH):
        encoder.check_cancelled()
        with torch.no_grad(), encoder.autocast():
            found = hidden_states(encoder.network, tokens[start : start + BATCH].to(encoder.device))
        parts.append({name: found[name].float().cpu() for name in _readers(architecture)})
    states = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(torch.isfinite(tensor).all() for tensor in states.values()):
        raise BrokenModel(
            "The text tower computes values that are not numbers (NaN or infinite), so its hidden states cannot be "
            "compared; its weights are damaged, or its training broke. Use a model from before that."
        )
    return PromptStates(states, _position_of(tokens))


def hidden_states(network: nn.Module, tokens_nl: Tensor) -> dict[str, Tensor]:
    """`STATES` of an open_clip text tower for tokens that end with the first end token of each row."""
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
    """Position by position in float64, prompt by prompt."""
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
            position: PositionDrift(cosines[there].mean().item(), distances[there].mean().item(), int(there.sum()))
            for number, position in enumerate(POSITIONS)
            if (there := positions == number).any()
        }
    told = list(notes)
    if text_sizes(architecture) not in READERS:
        told.append(
            "Image models read a CLIP-L or CLIP-G, and this text tower has other sizes: its hidden states are compared "
            "as if it were a CLIP-L."
        )
    return ConditioningDrift(len(new.positions), states, _readers(architecture), tuple(told))


def _readers(architecture: Architecture) -> dict[str, str]:
    return READERS.get(text_sizes(architecture), READERS[CLIP_L])


def _position_of(tokens_nl: Tensor) -> Tensor:
    """For each token, the index in `POSITIONS` of what it is."""
    places = torch.arange(tokens_nl.shape[1]).expand_as(tokens_nl)
    ends = (tokens_nl == END).int().argmax(1, keepdim=True)
    positions = torch.full_like(tokens_nl, POSITIONS.index("words"))
    positions[places == 0] = POSITIONS.index("start")
    positions[places == ends] = POSITIONS.index("end")
    positions[places > ends] = POSITIONS.index("padding")
    return positions
