"""The rows of the table: our steps as the trainer runs them, and the peers' as their users write them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..clip.full_clip import FullCLIP
from ..clip.gmp import to_gmp
from ..clip.network import open_clip_configs
from ..data.images.decoding import normalize
from ..data.loader import Batch
from ..train.config import TrainConfig
from ..train.device import DTYPES
from ..train.frozen_features import FrozenFeatures
from ..train.setup import Plan
from ..train.step import TrainingStep, build_weights


class Step(Protocol):
    """Trains on a batch and returns the loss, detached."""

    optimizer: torch.optim.Optimizer

    def __call__(self, batch: Batch) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the table.

    `build` takes the model, the device and the batch; a module-level function, so that another process can call it too.
    `loss` names the loss in LOSSES that its first loss must equal, "" for none. A call trains on `batches` batches.
    `towers` are those whose multiplications count.
    """

    name: str
    dtype: str
    build: Callable[[FullCLIP, torch.device, Batch], Step]
    loss: str = "infonce"
    batches: int = 1
    towers: tuple[str, ...] = ("vision", "text")


# ---- our steps -------------------------------------------------------------------------------------------------------


class OurStep:
    """The trainer's own step, as `clip-finetune train` runs it with these settings."""

    def __init__(self, model: FullCLIP, device: torch.device, batch: Batch, *, precision: str, **settings: Any) -> None:
        config = TrainConfig.from_flat(batch_size=batch.pairs, precision=precision, **settings)
        plan = Plan(device=device, precision=precision, batch_size=batch.pairs, steps_per_epoch=1000, total_steps=1000)
        weights = build_weights(to_gmp(model) if config.gmp else model, config, plan)
        frozen_vision = None
        if config.towers == "text":  # every batch comes with its features, so the cache is never asked
            frozen_vision = FrozenFeatures(weights.network, device, None, None)  # type: ignore[arg-type]  # no cache
        self.step = TrainingStep(weights, config, plan, frozen_vision=frozen_vision)
        self.optimizer, self.done = self.step.optimizer, 0
        self.features = None if frozen_vision is None else self._features(batch)

    def _features(self, batch: Batch) -> list[Tensor]:
        """Do as from the second epoch on: the features of the frozen vision tower are cached, and no image is read."""
        with torch.no_grad():
            return list(self.step.encode_images(batch.images).cpu())

    def __call__(self, batch: Batch) -> Tensor:
        if self.features is not None:
            batch = batch._replace(images=batch.images[:0], features=self.features, views=[0] * batch.pairs)
        loss = self.step(batch, self.done).loss
        self.done += 1
        return loss


def our_contenders(precision: str) -> list[Contender]:
    def ours(name: str, **settings: Any) -> Contender:
        towers = ("text",) if settings.get("towers") == "text" else ("vision", "text")
        return Contender(name, precision, functools.partial(OurStep, precision=precision, **settings), towers=towers)

    return [ours("ours"), ours("ours, GmP", gmp=True), ours("ours, text tower, images cached", towers="text")]


# ---- the peers -------------------------------------------------------------------------------------------------------


class PeerStep:
    """The usual step: zero_grad, forward (under autocast unless `dtype` is fp32), backward, optimizer step.

    The optimizer is adabelief-pytorch's own AdaBelief at our settings. `loss` takes the network, images and token ids.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], device: torch.device, dtype: str
    ) -> None:
        from adabelief_pytorch import AdaBelief

        self.network, self.loss, self.device, self.dtype = network.to(device).train(), loss, device, DTYPES[dtype]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            self.optimizer: torch.optim.Optimizer = AdaBelief(
                self.network.parameters(), lr=1e-6, weight_decay=0.01, print_change_log=False
            )

    def __call__(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        images, tokens = normalize(batch.images.to(self.device)), batch.tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.network, images, tokens)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def open_clip_step(model: FullCLIP, device: torch.device, batch: Batch, *, dtype: str) -> PeerStep:
    """Return a step of `open_clip.CLIP` with these weights, and `open_clip.ClipLoss`."""
    import open_clip

    clip_loss = open_clip.ClipLoss()
    return PeerStep(
        open_clip_network(model), lambda network, images, tokens: clip_loss(*network(images, tokens)), device, dtype
    )


def open_clip_network(model: FullCLIP) -> nn.Module:
    """Return open_clip's own model in fp32 with these weights, not the subclass that we run."""
    import open_clip

    a = model.architecture
    vision, text = open_clip_configs(a)
    network = open_clip.CLIP(a.embed_dim, vision, text, quick_gelu=a.activation == "quick_gelu")
    network.load_state_dict(dict(model.state_dict))
    return network


def hugging_face_step(model: FullCLIP, device: torch.device, batch: Batch, *, dtype: str) -> PeerStep:
    """Return a step of transformers' `CLIPModel` with these weights, and its own loss."""
    from transformers import CLIPConfig, CLIPModel

    from ..clip.huggingface import config_of
    from ..clip.names import to_hf

    network = CLIPModel(CLIPConfig(**config_of(model.architecture, model.state_dict)))
    network.load_state_dict(to_hf(model.state_dict), strict=False)
    return PeerStep(
        network,
        lambda network, images, tokens: network(pixel_values=images, input_ids=tokens, return_loss=True).loss,
        device,
        dtype,
    )


def peers(device: torch.device, on_note: Callable[[str], None]) -> list[Contender]:
    """Return the installed peers as their users train them: in fp32 on a CPU, under bf16 autocast on a GPU."""
    dtype = "bf16" if device.type == "cuda" else "fp32"
    contenders = [Contender("open_clip + adabelief-pytorch", dtype, functools.partial(open_clip_step, dtype=dtype))]
    if importlib.util.find_spec("transformers") is None:
        on_note("Hugging Face's CLIPModel is skipped because transformers is not installed.")
    else:
        build = functools.partial(hugging_face_step, dtype=dtype)
        contenders.append(Contender("Hugging Face CLIPModel + adabelief-pytorch", dtype, build))
    return contenders
