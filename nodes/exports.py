"""Nodes that bring a trained text tower into image generation: as a CLIP, a text encoder file, or a LoRA."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..engine.clip import encoders
from ..engine.clip.exports import export
from ..engine.clip.full_clip import FullCLIP
from ..engine.clip.tensor_files import DTYPES, write_safetensors
from ..engine.errors import UserError
from .host import clips, folders
from .host.device import check_cancelled
from .host.display import Display
from .schema import baseline_input, filename_prefix_input, node_schema, widget
from .sockets import FullClip


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the text encoders in ComfyUI's CLIPs, and which models have it."""

    name: str
    display_name: str
    trained_model: str
    image_models: str
    sizes: tuple[int, int, int, int]


_CLIP_L = _Part(clips.CLIP_L, "CLIP-L", "ViT-L/14", "SD1.5, SDXL, SD3 or Flux", encoders.CLIP_L)
_CLIP_G = _Part(clips.CLIP_G, "CLIP-G", "ViT-bigG/14", "SDXL or SD3", encoders.CLIP_G)


def _export_schema(part: _Part, node_id: str, description: str) -> io.Schema:
    replaced = f"The CLIP of an {part.image_models} model: its {part.display_name} is replaced."
    return node_schema(
        node_id,
        f"Export {part.display_name}",
        "export",
        description,
        aliases=f"text encoder, save clip, use trained clip, {part.name}",
        inputs=[
            FullClip.Input("full_clip", tooltip=f"A {part.trained_model}. GmP form is folded to plain weights."),
            io.Clip.Input("clip", optional=True, tooltip=replaced),
            filename_prefix_input(f"clip/{part.name}"),
            widget(
                "dtype",
                "fp16",
                "fp16 is what image models come with; ComfyUI computes with it either way.",
                choices=DTYPES,
            ),
            widget("save", True, "Off: only the clip output, no file."),
            widget(
                "strength",
                1.0,
                "1: the trained text encoder. 0: the one in the connected clip. Above 1: exaggerate the change.",
                min=0.0,
                max=1.5,
                step=0.05,
            ),
        ],
        outputs=dict(clip=io.Clip, path=io.String),
        is_output_node=True,
    )


def _export(
    part: _Part,
    display: Display,
    full_clip: FullCLIP,
    clip: Any = None,
    filename_prefix: str | None = None,
    dtype: str = "fp16",
    save: bool = True,
    strength: float = 1.0,
) -> io.NodeOutput:
    encoders.require_text_tower(full_clip, part.sizes)
    if strength != 1 and clip is None:
        raise UserError(f"strength is {strength:g}, which needs a text encoder to mix with: connect a clip, or use 1.")
    file = folders.new_output_file(filename_prefix or f"clip/{part.name}") if save else None
    tensors = encoders.text_encoder_state_dict(full_clip, dtype=dtype, on_note=display.note)
    if strength != 1:
        original = clips.text_encoder_tensors(clip, part.name)
        tensors = encoders.mix_text_encoders(original, tensors, strength, projection=part is _CLIP_G)
    # Replaced before anything is written, because it may be refused.
    result = clips.replace_text_encoder(clip, part.name, tensors) if clip is not None else None
    path = ""
    if file is not None:
        path = folders.relative_to_output(write_safetensors(tensors, file, {"format": "pt"}))
        display.note(f"Saved output/{path}")
    if result is None:
        result = clips.clip_from_file(file) if file is not None else clips.clip_from_tensors(tensors)
    return io.NodeOutput(result, path)


class ExportClipL(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _export_schema(
            _CLIP_L,
            "ExportClipL",
            "Makes the trained text encoder usable in the same graph, through the clip output, and saves it as a file "
            "that ComfyUI's CLIP loaders list. With a clip connected, only its CLIP-L is replaced.",
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, clip: Any = None, **widgets: Any) -> io.NodeOutput:
        return _export(_CLIP_L, Display(cls), full_clip, clip, **widgets)


class ExportClipG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _export_schema(
            _CLIP_G,
            "ExportClipG",
            "Makes the trained text encoder of a ViT-bigG/14 the CLIP-G of an SDXL or SD3 CLIP, and saves it as a file "
            "that ComfyUI's CLIP loaders list.",
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, clip: Any = None, **widgets: Any) -> io.NodeOutput:
        return _export(_CLIP_G, Display(cls), full_clip, clip, **widgets)


class ExportClipLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "ExportClipLoRA",
            "Export CLIP LoRA",
            "export",
            "Saves what the training changed in the text encoder as a small LoRA for Load LoRA, and shows "
            "how much of the change it keeps.",
            aliases="extract lora, save lora, difference, text encoder",
            inputs=[
                FullClip.Input("full_clip", tooltip="The trained model."),
                baseline_input(),
                widget("rank", 32, "A higher rank keeps more of the change, in a larger file.", min=1, max=1280),
                filename_prefix_input("loras/clip"),
            ],
            outputs=dict(path=io.String),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, full_clip: FullCLIP, baseline: FullCLIP, rank: int = 32, filename_prefix: str = "loras/clip"
    ) -> io.NodeOutput:
        display, file = Display(cls), folders.new_output_file(filename_prefix)
        export(
            full_clip,
            file,
            format="lora",
            baseline=baseline,
            rank=rank,
            on_note=display.note,
            on_progress=display.progress,
            check_cancelled=check_cancelled,
        )
        path = folders.relative_to_output(file)
        display.note(f"Saved output/{path}")
        return io.NodeOutput(path)


NODES = [ExportClipL, ExportClipG, ExportClipLoRA]
