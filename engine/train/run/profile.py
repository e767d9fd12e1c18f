"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time

import torch

PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging")


class Profile:
    """Seconds by part of a step. Switched off it does nothing; switched on it waits for the device after each part, so
    that the times are true and the training a little slower."""

    def __init__(self, device: torch.device, enabled: bool):
        self.device, self.enabled = device, enabled
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0

    @contextlib.contextmanager
    def __call__(self, part: str):
        if not self.enabled:
            yield
            return
        began = self._now()
        yield
        self.seconds[part] += self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def rows(self) -> list[dict[str, str]]:
        """A row a part for a table: milliseconds a step and the share of all."""
        total = sum(self.seconds.values())
        return [
            {
                "part of a step": part,
                "ms": f"{1000 * seconds / max(self.steps, 1):.2f}",
                "share": f"{seconds / total:.1%}" if total else "",
            }
            for part, seconds in [*self.seconds.items(), ("all", total)]
        ]
