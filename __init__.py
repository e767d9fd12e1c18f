"""clip-finetune: fine-tune CLIP in the ComfyUI graph. Without ComfyUI, import `clip_finetune.engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import ClipFinetuneExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ClipFinetuneExtension:
    """Return the extension with the pack's nodes; ComfyUI calls this."""
    from .nodes import ClipFinetuneExtension

    return ClipFinetuneExtension()
