"""Nodes that bring a trained text tower into image generation: as a CLIP, a text encoder file, or a LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.clip import encoders
from ..engine.clip.exports import export
from ..engine.clip.tensor_files import DTYPES, write_safetensors
from ..engine.errors import UserError
from . import host
from .sockets import CATEGORY, PREFIX_TOOLTIP, FullClip

_DTYPES = list(DTYPES)


def _export_inputs(model: str, hosts: str, part: str, prefix: str):
    return [
        FullClip.Input("full_clip", tooltip=f"A {model}. One in GmP form is folded."),
        io.Clip.Input("clip", optional=True, tooltip=f"The CLIP of an {hosts} model, to replace the {part} in."),
        io.String.Input("filename_prefix", default=prefix, optional=True, tooltip=PREFIX_TOOLTIP),
        io.Combo.Input(
            "dtype",
            options=_DTYPES,
            default="fp16",
            optional=True,
            tooltip="fp16 is what image programs use; ComfyUI computes with it either way.",
        ),
        io.Boolean.Input("save", default=True, optional=True, tooltip="Off: only the clip output, no file."),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.5,
            step=0.05,
            optional=True,
            tooltip="1 is the trained text encoder, 0 the one in the connected clip, above 1 goes further.",
        ),
    ]


def _export(cls, sizes, part, full_clip, clip, filename_prefix, dtype, save, strength):
    display = host.Display(cls.hidden.unique_id)
    encoders.require_text_tower(full_clip, sizes)
    if strength != 1 and clip is None:
        raise UserError(f"strength is {strength:g}, which needs something to mix with: connect a clip, or set it to 1.")
    file = host.new_output_file(filename_prefix) if save else None
    notes: list[str] = []
    tensors = encoders.text_encoder_state_dict(full_clip, dtype=dtype, on_note=notes.append)
    if strength != 1:
        original = host.text_encoder_tensors(clip, part)
        tensors = encoders.mix_text_encoders(original, tensors, strength, projection=part == host.CLIP_G)
    # Refused before anything is written.
    swapped = host.replace_text_encoder(clip, part, tensors) if clip is not None else None
    path = ""
    if file is not None:
        path = host.relative_to_output(write_safetensors(tensors, file, {"format": "pt"}))
        display.say(f"Saved output/{path}")
    for note in notes:
        display.say(note)
    if swapped is None:
        swapped = host.clip_from_file(file) if file is not None else host.clip_from_tensors(tensors)
    return io.NodeOutput(swapped, path)


class ExportClipL(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ExportClipL",
            display_name="Export CLIP-L",
            category=CATEGORY,
            description="Makes the trained text tower the CLIP of a graph, and saves it as a text encoder that "
            "ComfyUI's CLIP loaders list. With a clip connected, only its CLIP-L part is replaced.",
            search_aliases=["text encoder", "save clip", "clip_l"],
            inputs=_export_inputs("ViT-L/14", "SD1.5, SDXL, SD3 or Flux", "CLIP-L", "clip/clip_l"),
            outputs=[io.Clip.Output(display_name="clip"), io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, filename_prefix="clip/clip_l", dtype="fp16", save=True, strength=1.0, clip=None):
        return _export(cls, encoders.CLIP_L, host.CLIP_L, full_clip, clip, filename_prefix, dtype, save, strength)


class ExportClipG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ExportClipG",
            display_name="Export CLIP-G",
            category=CATEGORY,
            description="Makes the trained text tower of a ViT-bigG/14 the CLIP-G of an SDXL or SD3 CLIP, and saves it "
            "as a text encoder that ComfyUI's CLIP loaders list.",
            search_aliases=["text encoder", "save clip", "clip_g"],
            inputs=_export_inputs("ViT-bigG/14", "SDXL or SD3", "CLIP-G", "clip/clip_g"),
            outputs=[io.Clip.Output(display_name="clip"), io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, filename_prefix="clip/clip_g", dtype="fp16", save=True, strength=1.0, clip=None):
        return _export(cls, encoders.CLIP_G, host.CLIP_G, full_clip, clip, filename_prefix, dtype, save, strength)


class ExportClipLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ExportClipLoRA",
            display_name="Export CLIP LoRA",
            category=CATEGORY,
            description="Saves what training changed in the text tower as a small LoRA, to add to a CLIP at any "
            "strength with Load LoRA, and says how much of the change it keeps.",
            search_aliases=["lora", "extract lora", "difference"],
            inputs=[
                FullClip.Input("full_clip", tooltip="The trained model."),
                FullClip.Input("baseline", tooltip="The model that it was trained from."),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1280,
                    optional=True,
                    tooltip="Higher keeps more of the change, in a larger file.",
                ),
                io.String.Input("filename_prefix", default="loras/clip", optional=True, tooltip=PREFIX_TOOLTIP),
            ],
            outputs=[io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, baseline, rank=32, filename_prefix="loras/clip"):
        display = host.Display(cls.hidden.unique_id)
        file = host.new_output_file(filename_prefix)
        notes: list[str] = []
        export(
            full_clip,
            file,
            format="lora",
            baseline=baseline,
            rank=rank,
            on_note=notes.append,
            on_progress=display.count,
            check_cancelled=host.check_cancelled,
        )
        path = host.relative_to_output(file)
        display.say(f"Saved output/{path}")
        for note in notes:
            display.say(note)
        return io.NodeOutput(path)


NODES = [ExportClipL, ExportClipG, ExportClipLoRA]
