"""What all contenders of `bench` do alike: the model, the batch, its loss, and how many operations it takes."""

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


def openai_architecture(
    *, patch_size: int, vision: tuple[int, int], text: tuple[int, int], image_size: int = 224, vocab_size: int = 49408
) -> Architecture:
    """Return the architecture of one of OpenAI's vision transformers; `vision` and `text` are (width, layers)."""
    return Architecture(
        embed_dim=text[0],
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision[0],
        vision_layers=vision[1],
        vision_heads=vision[0] // 64,
        vision_mlp_width=4 * vision[0],
        context_length=77,
        vocab_size=vocab_size,
        text_width=text[0],
        text_layers=text[1],
        text_heads=text[0] // 64,
        text_mlp_width=4 * text[0],
        activation="quick_gelu",
    )


ARCHITECTURES = {
    "ViT-B-32": openai_architecture(patch_size=32, vision=(768, 12), text=(512, 12)),
    "ViT-L-14": openai_architecture(patch_size=14, vision=(1024, 24), text=(768, 12)),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What to train: small enough to be sent to another process. `source` is a file or a name in ARCHITECTURES."""

    source: str
    batch_size: int
    activation: str = "auto"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)

    def open_model(self) -> FullCLIP:
        """Return a plain model in fp32: an architecture with random weights, or the one in a file."""
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
    """Return images of noise, and captions of 8 to 20 random tokens between the start and the end token."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, a.image_size, a.image_size), generator=rng, dtype=torch.uint8)
    tokens = torch.zeros(pairs, a.context_length, dtype=torch.int64)
    longest = min(20, a.context_length - 2)
    for row in tokens:
        length = int(torch.randint(min(8, longest), longest + 1, (), generator=rng))
        row[1 : length + 1] = torch.randint(1, a.vocab_size - 2, (length,), generator=rng)
        row[0], row[length + 1] = a.vocab_size - 2, a.vocab_size - 1
    numbers = torch.arange(pairs)
    return Batch(images, tokens, numbers, numbers, list(range(pairs)))


def flop_per_pair(a: Architecture, towers: Sequence[str] = ("vision", "text")) -> int:
    """Return the operations to train a vision transformer on one pair: 2 m n k per matrix product, over all positions.

    The backward pass counts twice as much as the forward pass. What an implementation leaves out counts too.
    """
    patches, (patch_size, layers, mlp_width) = a.grid**2, a.vit
    forward = {
        "vision": _tower_flop(patches + 1, a.vision_width, layers, mlp_width, a.embed_dim)
        + 2 * patches * 3 * patch_size**2 * a.vision_width,
        "text": _tower_flop(a.context_length, a.text_width, a.text_layers, a.text_mlp_width, a.embed_dim),
    }
    return 3 * sum(forward[tower] for tower in towers)


def _tower_flop(positions: int, width: int, layers: int, mlp_width: int, embed_dim: int) -> int:
    attention = 4 * 2 * positions * width**2 + 2 * 2 * positions**2 * width
    return layers * (attention + 2 * 2 * positions * width * mlp_width) + 2 * width * embed_dim


def our_loss(model: FullCLIP, batch: Batch, device: torch.device, name: str) -> float:
    """Return the value of one of LOSSES before the first step, in fp32."""
    network = build_network(model, device=device)
    loss = LOSSES[name].make(0.07, 0.1).to(device)
    with torch.no_grad():
        images = network.encode_image(normalize(batch.images.to(device)))
        texts = network.encode_text(batch.tokens.to(device))
        return float(loss(images, texts, network.logit_scale, torch.eye(batch.pairs, dtype=torch.bool, device=device)))


def peak_allocation(action: Callable[[], object], device: torch.device) -> int:
    """Return the bytes by which torch's allocated memory grew at most while the action ran."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    # torch has no public way to ask the CPU's allocator, so this adds up the profiler's records of it.
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
