"""config.json: what a run is made of."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from ...data.dataset import ClipDataset
from ...files import write_json
from ..memory import Forecast
from ..setup import TrainSetup
from .folder import RunFolder

_PACKAGES = ("clip-finetune", "torch", "torchvision", "open_clip_torch", "adabelief-pytorch", "safetensors", "pillow")


def describe_run(
    folder: RunFolder,
    setup: TrainSetup,
    origins: Mapping[str, str],
    groups: Sequence[Mapping[str, str]],
    micro_batch: int,
    forecast: Forecast,
) -> None:
    """Write config.json: every setting with its origin, the model, data and machine of a run."""
    model, plan, identity = setup.model, setup.plan, setup.identity
    validation = setup.validation and _describe_data(setup.validation, identity["validation"])
    write_json(
        folder.config_file,
        {
            "settings": setup.config.origins(origins),
            "identity": identity,
            "model": {"architecture": model.architecture.as_dict(), "provenance": dict(model.provenance)},
            "data": {"train": _describe_data(setup.train_set, identity["train"]), "validation": validation},
            "groups": groups,
            "batch_size": plan.batch_size,
            "micro_batch": micro_batch,
            "memory_forecast_bytes": dataclasses.asdict(forecast),
            "steps_per_epoch": plan.steps_per_epoch,
            "total_steps": plan.total_steps,
            "precision": plan.precision,
            "device": _device_name(plan.device),
            "versions": {"python": platform.python_version(), "system": platform.platform()} | _versions(),
        },
    )


def _describe_data(dataset: ClipDataset, fingerprint: str) -> dict[str, Any]:
    """`manifest` is a hash of every name, caption and class, and of each image's size and time."""
    return {
        "name": dataset.name,
        "folder": str(dataset.folder),
        "images": len(dataset),
        "captions": sum(map(len, dataset.captions)),
        "manifest": fingerprint,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # our own, where it is a folder of custom_nodes
            continue
    return versions
