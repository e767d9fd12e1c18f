"""What all contenders of `bench` do alike: a model, a batch, its loss and what it costs to compute."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch

from ..clip.architecture import Architecture
from ..clip.full_clip import FullCLIP
from ..clip.gmp import fold_gmp
from ..clip.load import load_full_clip
from ..clip.network import build_network, random_full_clip
from ..data.images.decoding import normalize
from ..data.loader import Batch
from ..errors import UserError
from ..train.losses import LOSSES

ARCHITECTURES = {
    "ViT-B-32": Architecture(
        embed_dim=512,
        image_size=224,
        patch_size=32,
        vision_width=768,
        vision_layers=12,
        vision_heads=12,
        vision_mlp_width=3072,
        context_length=77,
        vocab_size=49408,
        text_width=512,
        text_layers=12,
        text_heads=8,
        text_mlp_width=2048,
        activation="quick_gelu",
    ),
    "ViT-L-14": Architecture(
        embed_dim=768,
        image_size=224,
        patch_size=14,
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        vision_mlp_width=4096,
        context_length=77,
        vocab_size=49408,
        text_width=768,
        text_layers=12,
        text_heads=12,
        text_mlp_width=3072,
        activation="quick_gelu",
    ),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What all do alike; small, so that it goes into another process."""

    source: str
    batch_size: int
    activation: str = "auto"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)

    def open_model(self) -> FullCLIP:
        """A plain model in fp32: random weights for the name of an architecture, else those of a file."""
        source = self.source
        if source in ARCHITECTURES:
            return random_full_clip(ARCHITECTURES[source], seed=0)
        if not os.path.exists(source):
            raise UserError(f"{source} is neither a file nor one of {' and '.join(ARCHITECTURES)}; choose one of them.")
        model = load_full_clip(source, activation=self.activation)
        if model.architecture.resnet:
            raise UserError(f"{source} has a ResNet as its vision tower; bench measures vision transformers only.")
        if model.parameterization == "gmp":
            model = fold_gmp(model)
        return FullCLIP(model.architecture, {name: tensor.float() for name, tensor in model.state_dict.items()})


def random_batch(a: Architecture, pairs: int, seed: int = 0) -> Batch:
    """Pictures of noise, and captions of 8 to 20 words between the start and the end token."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, a.image_size, a.image_size), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(pairs, a.context_length, dtype=torch.int64)
    longest = min(20, a.context_length - 2)
    for row in tokens:
        words = int(torch.randint(min(8, longest), longest + 1, (), generator=generator))
        row[1 : words + 1] = torch.randint(1, a.vocab_size - 2, (words,), generator=generator)
        row[0], row[words + 1] = a.vocab_size - 2, a.vocab_size - 1
    numbers = torch.arange(pairs)
    return Batch(images, tokens, numbers, numbers, list(range(pairs)))


def flop_per_pair(a: Architecture, towers: Sequence[str] = ("vision", "text")) -> int:
    """Of a trained pair: 2·m·n·k of each matrix product of the forward pass over all positions, and twice as many in
    backward; whatever of it an implementation leaves out."""
    patches = a.grid**2
    forward = {
        "vision": _tower_flop(patches + 1, a.vision_width, a.vision_layers, a.vision_mlp_width, a.embed_dim)
        + 2 * patches * 3 * a.patch_size**2 * a.vision_width,
        "text": _tower_flop(a.context_length, a.text_width, a.text_layers, a.text_mlp_width, a.embed_dim),
    }
    return 3 * sum(forward[tower] for tower in towers)


def _tower_flop(positions: int, width: int, layers: int, mlp: int, embed: int) -> int:
    attention = 4 * 2 * positions * width**2 + 2 * 2 * positions**2 * width
    return layers * (attention + 2 * 2 * positions * width * mlp) + 2 * width * embed


def our_loss(model: FullCLIP, batch: Batch, device: torch.device, name: str) -> float:
    """A loss of ours before the first step, in fp32."""
    network = build_network(model, device=device)
    with torch.no_grad():
        features = (
            network.encode_image(normalize(batch.images.to(device))),
            network.encode_text(batch.tokens.to(device)),
        )
        positives = torch.eye(batch.pairs, dtype=torch.bool, device=device)
        return float(LOSSES[name].make(0.07, 0.1).to(device)(*features, network.logit_scale, positives))


def most_allocated(action: Callable[[], object], device: torch.device) -> int:
    """By how many bytes what torch has allocated grew at most while the action ran."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
