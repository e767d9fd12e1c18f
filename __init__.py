"""clip-finetune: fine-tune CLIP in the ComfyUI graph. Importable without ComfyUI, where only `engine` is of use."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this to get the pack's nodes."""
    from .nodes import ClipFinetuneExtension

    return ClipFinetuneExtension()
