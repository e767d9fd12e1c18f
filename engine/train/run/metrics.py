"""The numbers of the steps on their way from the device to metrics.jsonl: several steps in one transfer."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from ..optim.gradient_norms import GradientNorms

# A line is in the file after so many steps or seconds, whichever is sooner.
STEPS, SECONDS = 10, 0.8


@dataclasses.dataclass(frozen=True)
class StepNumbers:
    """One step's numbers on the host; `finite` is whether it changed the weights."""

    record: dict[str, Any]
    loss: float
    grad_norm: float
    by_group: list[float]
    by_layer: list[float]
    finite: bool


class PendingSteps:
    """Steps whose numbers are still on the device."""

    def __init__(self):
        self.records: list[tuple[dict[str, Any], Tensor]] = []
        self.sizes = (0, 0)
        self.since = time.monotonic()

    def __len__(self) -> int:
        return len(self.records)

    def add(
        self, record: dict[str, Any], loss: Tensor, logit_scale: Tensor, finite: Tensor, norms: GradientNorms
    ) -> None:
        """`record` gets the fields that need the device when it is taken; `finite` is a bool tensor."""
        dtype = torch.promote_types(loss.dtype, torch.float32)
        scalars = torch.stack([value.reshape(()).to(dtype) for value in (loss, logit_scale, finite, norms.total)])
        self.sizes = (len(norms.by_group), len(norms.by_layer))
        self.records.append((record, torch.cat([scalars, norms.by_group.to(dtype), norms.by_layer.to(dtype)])))

    def due(self) -> bool:
        return len(self) >= STEPS or time.monotonic() - self.since > SECONDS

    def take(self) -> list[StepNumbers]:
        """All pending steps, oldest first; waits for the device, once. The pairs per second are those of the time since
        the last taking."""
        if not self.records:
            self.since = time.monotonic()
            return []
        rows = torch.stack([numbers for _, numbers in self.records]).tolist()
        now = time.monotonic()
        pairs = sum(record["pairs"] for record, _ in self.records)
        speed = round(pairs / max(now - self.since, 1e-9), 3)
        groups, taken = self.sizes[0], []
        for (record, _), (loss, logit_scale, finite, total, *lengths) in zip(self.records, rows, strict=True):
            record = {key: value for key, value in record.items() if key != "pairs"}
            record |= {"loss": loss, "grad_norm": total, "logit_scale": logit_scale, "pairs_per_second": speed}
            taken.append(StepNumbers(record, loss, total, lengths[:groups], lengths[groups:], bool(finite)))
        self.records, self.since = [], now
        return taken

    def skip_time(self) -> None:
        """What passed since the last taking was not training; nothing is pending."""
        self.since = time.monotonic()
