"""Nodes that load, fold, save and merge full CLIPs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..engine.clip.encoders import CLIP_L, require_text_tower
from ..engine.clip.exports import EXPORTS, export
from ..engine.clip.full_clip import FullCLIP
from ..engine.clip.gmp import NOTHING_TO_FOLD, fold_gmp
from ..engine.clip.load import load_full_clip
from ..engine.clip.merge import merge_text_encoder, merge_vision_encoder, transplant_tower
from ..engine.clip.tensor_files import MIXED
from ..engine.clip.variants.long_clip import LONG_CONTEXT
from ..engine.errors import UserError
from .host import clips, folders
from .host.display import Display
from .schema import filename_prefix_input, node_schema, widget
from .sockets import FullClip

# A text tower alone has nodes of its own.
_FORMATS = {name: format for name, format in EXPORTS.items() if not format.text_only}


class LoadFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LoadFullCLIP",
            "Load Full CLIP",
            "model",
            "Loads a full CLIP (text and vision tower): a file in models/full_clip, a model you saved, the "
            "best model of a training, or OpenAI's, which is downloaded on first use.",
            aliases="open clip, clip model, vit-l, checkpoint",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=folders.list_models(),
                    tooltip="SD1.5, SDXL, SD3 and Flux use the text encoder of ViT-L-14. Press R after adding a file.",
                ),
                widget(
                    "activation",
                    "auto",
                    "The activation function of the MLPs. OpenAI's models use quick_gelu, LAION's gelu; few "
                    "files say which.",
                    choices=["auto", "quick_gelu", "gelu"],
                    advanced=True,
                ),
                widget(
                    "context_length",
                    "auto",
                    f"{LONG_CONTEXT}: room for long captions, as in Long-CLIP. A model for 77 tokens is "
                    "stretched; train it on long captions afterwards.",
                    choices=["auto", str(LONG_CONTEXT)],
                    advanced=True,
                ),
            ],
            outputs=dict(full_clip=FullClip),
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **widgets: Any) -> tuple[str | int, ...]:
        return folders.file_fingerprint(folders.find_model(model)) if model in folders.list_models() else (model,)

    @classmethod
    def execute(cls, model: str, activation: str = "auto", context_length: str = "auto") -> io.NodeOutput:
        length = None if context_length == "auto" else int(context_length)
        full_clip = load_full_clip(folders.find_model(model), activation=activation, context_length=length)
        sizes, form = full_clip.architecture, ", in GmP form" if full_clip.parameterization == "gmp" else ""
        display = Display(cls)
        display.note(
            f"Vision tower of width {sizes.vision_width}, text tower of width {sizes.text_width}, "
            f"{full_clip.dtypes[0]}{form}"
        )
        display.notes(full_clip.notes)
        return io.NodeOutput(full_clip)


class FoldGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoldGmP",
            "Fold GmP",
            "model",
            "Converts a model that was trained with GmP back to plain weights, which every program can "
            "load. It computes the same as before.",
            aliases="geometric parameterization, convert, plain weights, clip",
            inputs=[FullClip.Input("full_clip")],
            outputs=dict(full_clip=FullClip),
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP) -> io.NodeOutput:
        if full_clip.parameterization == "linear":
            Display(cls).note(NOTHING_TO_FOLD)
        return io.NodeOutput(fold_gmp(full_clip))


class SaveFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "SaveFullCLIP",
            "Save Full CLIP",
            "model",
            "Saves a full CLIP in ComfyUI's output folder: as one file or as a Hugging Face folder, which "
            "Load Full CLIP can load again, or its vision tower alone.",
            aliases="export clip, save model, hugging face, transformers, clip vision",
            inputs=[
                FullClip.Input("full_clip"),
                filename_prefix_input("full_clip/my_clip"),
                widget(
                    "format",
                    "openai",
                    "\n".join(f"{name}: {format.help}." for name, format in _FORMATS.items()),
                    choices=_FORMATS,
                ),
                widget(
                    "dtype",
                    "fp32",
                    "fp32 if you want to train it further; fp16 is half the size. mixed is what OpenAI's own "
                    "files are: fp16, with norms and embeddings in fp32.",
                    choices=["fp16", "bf16", "fp32", MIXED],
                ),
            ],
            outputs=dict(path=io.String),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        full_clip: FullCLIP,
        filename_prefix: str = "full_clip/my_clip",
        format: str = "openai",
        dtype: str = "fp32",
    ) -> io.NodeOutput:
        display, file = Display(cls), folders.new_output_file(filename_prefix)
        path = file.with_suffix("") if EXPORTS[format].folder else file
        export(full_clip, path, format=format, dtype=dtype, on_note=display.note)
        shown = folders.relative_to_output(path)
        display.note(f"Saved output/{shown}")
        return io.NodeOutput(shown)


class MergeTEWithVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "MergeTEWithVision",
            "Merge Text Encoder With Vision",
            "model",
            "Makes the CLIP-L of a checkpoint trainable: takes the text tower from clip (with its LoRAs) "
            "and everything else from full_clip.",
            aliases="train checkpoint, fine-tune text encoder, clip to full clip, lora",
            inputs=[
                io.Clip.Input("clip", tooltip="From any checkpoint or CLIP loader that holds a CLIP-L."),
                FullClip.Input("full_clip", tooltip="Gives the vision tower, both projections and the temperature."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Takes the vision tower from here instead: a ViT-L/14's."
                ),
            ],
            outputs=dict(full_clip=FullClip),
        )

    @classmethod
    def execute(cls, clip: Any, full_clip: FullCLIP, clip_vision: Any = None) -> io.NodeOutput:
        require_text_tower(full_clip, CLIP_L)
        tensors = clips.text_encoder_tensors(clip, clips.CLIP_L)
        merged = merge_text_encoder(tensors, full_clip, source="the connected CLIP")
        if clip_vision is not None:
            activation = clips.vision_activation(clip_vision)
            if activation not in (None, full_clip.architecture.activation):
                raise UserError(
                    f"The connected clip_vision uses {activation} and the full CLIP "
                    f"{full_clip.architecture.activation}; connect the vision tower of a ViT-L/14 of the same kind."
                )
            tensors = clips.vision_encoder_tensors(clip_vision)
            merged = merge_vision_encoder(tensors, merged, source="the connected clip_vision")
        Display(cls).notes(merged.notes)
        return io.NodeOutput(merged)


class TransplantTower(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TransplantTower",
            "Transplant Tower",
            "model",
            "Combines two models: the text tower of one and the vision tower of the other.",
            aliases="swap text encoder, combine clip, vision tower, merge",
            inputs=[
                FullClip.Input("text_from", tooltip="Gives the text tower, its projection and the temperature."),
                FullClip.Input("vision_from", tooltip="Gives the vision tower and its projection."),
            ],
            outputs=dict(full_clip=FullClip),
        )

    @classmethod
    def execute(cls, text_from: FullCLIP, vision_from: FullCLIP) -> io.NodeOutput:
        combined = transplant_tower(text_from, vision_from)
        Display(cls).notes(combined.notes)
        return io.NodeOutput(combined)


NODES = [LoadFullCLIP, FoldGmP, SaveFullCLIP, MergeTEWithVision, TransplantTower]
