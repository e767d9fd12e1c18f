"""Where the time of a training step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")


class Profile:
    """Seconds by part of a step.

    Disabled it does nothing. Enabled it waits for the device after each part, so that the times are right and the
    training a little slower.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        start = self._now()
        yield
        self.seconds[part] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def rows(self) -> list[dict[str, str]]:
        """Return a table: milliseconds per step and share of the total, by part."""
        total = sum(self.seconds.values())
        return [
            {
                "part of a step": part,
                "ms": f"{1000 * seconds / max(self.steps, 1):.2f}",
                "share": f"{seconds / total:.1%}" if total else "",
            }
            for part, seconds in [*self.seconds.items(), ("all", total)]
        ]
