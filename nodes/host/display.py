"""What a node shows while it runs: a progress bar, a preview image and text. Also images to and from tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import comfy.utils
import numpy
import torch
from comfy_api.latest import io
from PIL import Image
from server import PromptServer

from ...engine.notes import Notes

_MIN_PREVIEW_SECONDS = 2.0
_MAX_PREVIEW_SHARE = 1 / 20  # of the time goes into drawing previews


class Display:
    """The progress bar, preview image and text of the running node; its schema must ask for the hidden `unique_id`."""

    def __init__(self, node: type[io.ComfyNode]) -> None:
        self._node_id = node.hidden.unique_id
        self._bar = comfy.utils.ProgressBar(1, node_id=self._node_id)
        self._notes = Notes(lambda note: self._send())
        self._next_preview = 0.0

    def progress(self, done: int, total: int) -> None:
        self._bar.update_absolute(done, max(total, 1))

    def preview(self, done: int, total: int, draw: Callable[[], Image.Image]) -> None:
        """Advance the progress bar and, unless the last preview is too recent, show the image that `draw` returns."""
        began = time.monotonic()
        if began < self._next_preview and done < total:
            self.progress(done, total)
            return
        image = draw().convert("RGB")  # a preview with an alpha channel crashes ComfyUI's server
        self._bar.update_absolute(done, max(total, 1), ("JPEG", image, image.width))
        drawing = time.monotonic() - began
        self._next_preview = began + max(_MIN_PREVIEW_SECONDS, drawing / _MAX_PREVIEW_SHARE)

    def note(self, text: str) -> None:
        """Add a sentence to the node's text. Texts of several lines are tables for the report, and are left out: the
        page would show their first lines, in a proportional font."""
        if text and "\n" not in text:
            self._notes.add(text)

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.note(text)

    def conclude(self, *sentences: str) -> None:
        """Add the results, most important first. (The latest note is on top, so they are added in reverse.)"""
        self.notes(reversed(sentences))

    def status(self, line: str) -> None:
        """Show a line above the notes until the next one."""
        self._send(line)

    def _send(self, *status: str) -> None:
        if self._node_id is None or PromptServer.instance is None:
            return
        PromptServer.instance.send_progress_text("\n".join([*status, *reversed([*self._notes])]), self._node_id)


def to_array(image: torch.Tensor) -> numpy.ndarray:
    """Convert one image of an IMAGE batch, [height, width, channels] from 0 to 1, to uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert one image of an IMAGE batch to PIL; one with a single channel becomes greyscale."""
    array = to_array(image)
    return Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert a PIL image to an IMAGE batch of one: float32 [1, height, width, 3] from 0 to 1."""
    return torch.from_numpy(numpy.array(image.convert("RGB"), dtype=numpy.float32) / 255.0)[None]
