"""config.json: what a run is, told by itself."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ...files import write_json

if TYPE_CHECKING:
    from ...data.dataset import ClipDataset
    from ..trainer import Training

_PACKAGES = ("clip-finetune", "torch", "torchvision", "open_clip_torch", "adabelief-pytorch", "safetensors", "pillow")


def describe_run(training: Training, identity: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Write config.json: every value with its origin, what the run is made of, and with what it runs."""
    model, folder = training.model, training.folder
    write_json(
        folder.config_file,
        {
            "settings": training.config.origins(origins),
            "identity": identity,
            "model": {"architecture": model.architecture.as_dict(), "provenance": dict(model.provenance)},
            "data": {
                "train": _data(training.train_set),
                "validation": training.validation and _data(training.validation),
            },
            "groups": training.work.group_rows,
            "batch_size": training.batch_size,
            "micro_batch": training.work.micro_batch,
            "memory_forecast_bytes": dataclasses.asdict(training.memory),
            "steps_per_epoch": training.steps_per_epoch,
            "total_steps": training.total_steps,
            "precision": training.precision,
            "device": _device_name(training.device),
            "versions": {"python": platform.python_version(), "system": platform.platform()} | _versions(),
        },
    )


def _data(dataset: ClipDataset) -> dict[str, Any]:
    """`manifest` is a hash of every name, caption, class, and picture's size and time."""
    return {
        "name": dataset.name,
        "folder": str(dataset.folder),
        "images": len(dataset),
        "captions": sum(map(len, dataset.captions)),
        "manifest": dataset.fingerprint(),
    }


def _device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # the pack itself, where it is a folder of custom_nodes
            continue
    return found
