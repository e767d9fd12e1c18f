"""The pack's own socket types. Their values are the engine's `FullCLIP` and `ClipDataset`."""

from comfy_api.latest import io

FullClip = io.Custom("FULL_CLIP")
Dataset = io.Custom("CLIP_DATASET")

CATEGORY = "CLIP fine-tune"
PREFIX_TOOLTIP = "Where in ComfyUI's output folder, and how the file's name begins; a number is added."
