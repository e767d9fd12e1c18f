"""Nodes that open, fold, save and merge full CLIPs."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.clip.encoders import CLIP_L, require_text_tower
from ..engine.clip.exports import EXPORTS, export
from ..engine.clip.gmp import NOTHING_TO_FOLD, fold_gmp
from ..engine.clip.load import load_full_clip
from ..engine.clip.merge import merge_text_encoder, merge_vision_encoder, transplant_tower
from ..engine.clip.tensor_files import MIXED
from ..engine.clip.variants.long_clip import LONG_CONTEXT
from ..engine.errors import UserError
from . import host
from .sockets import CATEGORY, PREFIX_TOOLTIP, FullClip

# A text tower alone has nodes of its own: ExportClipL, ExportClipG and ExportClipLoRA.
_FORMATS = {name: export_format for name, export_format in EXPORTS.items() if not export_format.text_only}


class LoadFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadFullCLIP",
            display_name="Load Full CLIP",
            category=CATEGORY,
            description="Opens a full CLIP (both towers): a file in models/full_clip, one you saved, a run's best "
            "model, or OpenAI's, which is downloaded when it is used.",
            search_aliases=["clip vit-l", "clip model"],
            inputs=[
                io.Combo.Input("model", options=host.list_models(), tooltip="SD and SDXL use ViT-L-14."),
                io.Combo.Input(
                    "activation",
                    options=["auto", "quick_gelu", "gelu"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="What the MLPs compute. OpenAI's models are quick_gelu, LAION's gelu; files seldom say it.",
                ),
                io.Combo.Input(
                    "context_length",
                    options=["auto", str(LONG_CONTEXT)],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=f"{LONG_CONTEXT}: room for long captions, as in Long-CLIP; a model for 77 tokens is "
                    "stretched. Train it on long captions then.",
                ),
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model, activation="auto", context_length="auto"):
        return host.file_fingerprint(host.find_model(model)) if model in host.list_models() else (model,)

    @classmethod
    def execute(cls, model, activation="auto", context_length="auto"):
        full_clip = load_full_clip(
            host.find_model(model),
            activation=activation,
            context_length=None if context_length == "auto" else int(context_length),
        )
        display = host.Display(cls.hidden.unique_id)
        a = full_clip.architecture
        display.say(
            f"{a.vision_width}-wide vision tower, {a.text_width}-wide text tower, {full_clip.dtypes[0]}"
            + (", in GmP form" if full_clip.parameterization == "gmp" else "")
        )
        for note in full_clip.notes:
            display.say(note)
        return io.NodeOutput(full_clip)


class FoldGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FoldGmP",
            display_name="Fold GmP",
            category=CATEGORY,
            description="Turns a model that was trained with GmP back into one with plain weights, which every program "
            "opens. The two compute the same.",
            inputs=[FullClip.Input("full_clip")],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, full_clip):
        folded = fold_gmp(full_clip)
        if full_clip.parameterization == "linear":
            host.Display(cls.hidden.unique_id).say(NOTHING_TO_FOLD)
        return io.NodeOutput(folded)


class SaveFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveFullCLIP",
            display_name="Save Full CLIP",
            category=CATEGORY,
            description="Saves a full CLIP in ComfyUI's output folder: as one file or a Hugging Face folder, both of "
            "which Load Full CLIP lists, or its vision tower for Load CLIP Vision.",
            inputs=[
                FullClip.Input("full_clip"),
                io.String.Input("filename_prefix", default="full_clip/my_clip", optional=True, tooltip=PREFIX_TOOLTIP),
                io.Combo.Input(
                    "format",
                    options=list(_FORMATS),
                    default="openai",
                    optional=True,
                    tooltip="\n".join(f"{name}: {export_format.help}." for name, export_format in _FORMATS.items()),
                ),
                io.Combo.Input(
                    "dtype",
                    options=["fp16", "bf16", "fp32", MIXED],
                    default="fp32",
                    optional=True,
                    tooltip="fp32 to train on with it; fp16 is half as large. mixed: as OpenAI's own files are, fp16 "
                    "with norms and embeddings in fp32.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, filename_prefix="full_clip/my_clip", format="openai", dtype="fp32"):
        display = host.Display(cls.hidden.unique_id)
        file = host.new_output_file(filename_prefix)
        saved = file.with_suffix("") if EXPORTS[format].folder else file
        notes: list[str] = []
        export(full_clip, saved, format=format, dtype=dtype, on_note=notes.append)
        path = host.relative_to_output(saved)
        for sentence in (f"Saved output/{path}", *notes):
            display.say(sentence)
        return io.NodeOutput(path)


class MergeTEWithVision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MergeTEWithVision",
            display_name="Merge Text Encoder With Vision",
            category=CATEGORY,
            description="Makes a full CLIP of the CLIP-L in a checkpoint, so that it can be trained: the text tower "
            "comes from the clip (with its LoRAs), everything else from the full CLIP.",
            inputs=[
                io.Clip.Input("clip", tooltip="From any checkpoint or CLIP loader that holds a CLIP-L."),
                FullClip.Input("full_clip", tooltip="Gives the vision tower, both projections and the temperature."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="A ViT-L/14's, to take the vision tower from instead."
                ),
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, full_clip, clip_vision=None):
        require_text_tower(full_clip, CLIP_L)
        tensors = host.text_encoder_tensors(clip, host.CLIP_L)
        merged = merge_text_encoder(tensors, full_clip, source="the connected CLIP")
        if clip_vision is not None:
            activation = host.vision_activation(clip_vision)
            if activation not in (None, full_clip.architecture.activation):
                raise UserError(
                    f"The connected clip_vision computes {activation}, the full CLIP "
                    f"{full_clip.architecture.activation}; connect the vision tower of a ViT-L/14 of the same kind."
                )
            tensors = host.vision_encoder_tensors(clip_vision)
            merged = merge_vision_encoder(tensors, merged, source="the connected clip_vision")
        return _with_notes(cls, merged)


class TransplantTower(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TransplantTower",
            display_name="Transplant Tower",
            category=CATEGORY,
            description="Makes one model of two: the text tower of the one, the vision tower of the other.",
            inputs=[
                FullClip.Input("text_from", tooltip="Gives the text tower, its projection and the temperature."),
                FullClip.Input("vision_from", tooltip="Gives the vision tower and its projection."),
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, text_from, vision_from):
        return _with_notes(cls, transplant_tower(text_from, vision_from))


def _with_notes(cls, full_clip):
    display = host.Display(cls.hidden.unique_id)
    for note in full_clip.notes:
        display.say(note)
    return io.NodeOutput(full_clip)


NODES = [LoadFullCLIP, FoldGmP, SaveFullCLIP, MergeTEWithVision, TransplantTower]
