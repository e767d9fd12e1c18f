"""Parameter groups and optimizers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainConfig

_EMBEDDINGS = ("token_embedding.weight", "positional_embedding", "class_embedding")


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Every parameter that trains, in exactly one group.

    Groups are text and vision, each with and without weight decay, and `logit_scale`. Decay acts on the matrices of
    attention, MLP, projections and patch embedding; not on embeddings, norms, biases, `r`, `theta` and `logit_scale`.
    """
    groups: dict[str, list] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_group_of(name, parameter), []).append((name, parameter))
    return [
        {
            "name": group,
            "names": [name for name, _ in members],
            "params": [parameter for _, parameter in members],
            "weight_decay": weight_decay if group in ("text", "vision") else 0.0,
        }
        for group, members in sorted(groups.items())
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if name == "logit_scale":
        return name
    tower = "vision" if name.startswith("visual.") else "text"
    decays = parameter.ndim >= 2 and not name.endswith((*_EMBEDDINGS, ".r", ".theta"))
    return tower if decays else f"{tower}_no_decay"


def build_optimizer(config: TrainConfig, groups: Iterable[dict]) -> torch.optim.Optimizer:
    """AdaBelief of adabelief-pytorch (Zhuang et al. 2020, arXiv:2010.07468) or torch's AdamW; decay is decoupled."""
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)
    from adabelief_pytorch import AdaBelief

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        return AdaBelief(
            list(groups), lr=config.learning_rate, betas=betas, eps=1e-16, weight_decouple=True, rectify=True,
            print_change_log=False,
        )  # fmt: skip


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, factor: float) -> dict[str, float]:
    """Set every group's rate to `factor` of its peak; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
