"""Nodes that open, fold, save, export and merge full CLIPs."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.clip.export import mix_text_encoders, require_clip_l, text_encoder_state_dict
from ..engine.clip.files import write_safetensors
from ..engine.clip.full_clip import load_full_clip, save_full_clip
from ..engine.clip.gmp import NOTHING_TO_FOLD, fold_gmp, to_gmp
from ..engine.clip.merge import merge_text_encoder
from ..engine.errors import UserError
from . import host
from .sockets import CATEGORY, FullClip

DTYPES = ["fp16", "bf16", "fp32"]
_PREFIX = "Where in ComfyUI's output folder, and how the file's name begins; a number is added."


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
                    "activation", options=["auto", "quick_gelu", "gelu"], default="auto", optional=True, advanced=True,
                    tooltip="What the MLPs compute. OpenAI's models are quick_gelu, LAION's gelu; files seldom say it.",
                ),
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, model, activation="auto"):
        return host.file_fingerprint(host.find_model(model)) if model in host.list_models() else (model,)

    @classmethod
    def execute(cls, model, activation="auto"):
        full_clip = load_full_clip(host.find_model(model), activation=activation)
        display = host.Display(cls.hidden.unique_id)
        a = full_clip.architecture
        display.say(f"{a.vision_width}-wide vision tower, {a.text_width}-wide text tower, {full_clip.dtypes[0]}"
                    + (", in GmP form" if full_clip.parameterization == "gmp" else ""))  # fmt: skip
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
            description="Saves both towers as one file in ComfyUI's output folder. Load Full CLIP lists it.",
            inputs=[
                FullClip.Input("full_clip"),
                io.String.Input("filename_prefix", default="full_clip/my_clip", optional=True, tooltip=_PREFIX),
                io.Combo.Input(
                    "format", options=["openai", "gmp"], default="openai", optional=True,
                    tooltip="openai: plain weights under OpenAI's names. gmp: in GmP form, to train on with it.",
                ),
                io.Combo.Input("dtype", options=DTYPES, default="fp32", optional=True,
                               tooltip="fp32 to train on with it; fp16 is half as large."),
            ],
            outputs=[io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, full_clip, filename_prefix="full_clip/my_clip", format="openai", dtype="fp32"):
        display = host.Display(cls.hidden.unique_id)
        gmp = full_clip.parameterization == "gmp"
        if format == "openai" and gmp:
            full_clip = fold_gmp(full_clip)
            display.say("The model was in GmP form; it was folded to plain weights.")
        elif format == "gmp" and not gmp:
            full_clip = to_gmp(full_clip)
        path = host.relative_to_output(save_full_clip(full_clip, host.new_output_file(filename_prefix), dtype=dtype))
        display.say(f"Saved output/{path}")
        return io.NodeOutput(path)


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
            inputs=[
                FullClip.Input("full_clip", tooltip="A ViT-L/14. One in GmP form is folded."),
                io.Clip.Input("clip", optional=True,
                              tooltip="The CLIP of an SD1.5, SDXL, SD3 or Flux model, to replace the CLIP-L in."),
                io.String.Input("filename_prefix", default="clip/clip_l", optional=True, tooltip=_PREFIX),
                io.Combo.Input("dtype", options=DTYPES, default="fp16", optional=True,
                               tooltip="fp16 is what image programs use; ComfyUI computes with it either way."),
                io.Boolean.Input("save", default=True, optional=True, tooltip="Off: only the clip output, no file."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.5, step=0.05, optional=True,
                    tooltip="1 is the trained text encoder, 0 the one in the connected clip, above 1 goes further.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip"), io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, full_clip, filename_prefix="clip/clip_l", dtype="fp16", save=True, strength=1.0, clip=None):
        display = host.Display(cls.hidden.unique_id)
        require_clip_l(full_clip)
        if strength != 1 and clip is None:
            raise UserError(
                f"strength is {strength:g}, which needs something to mix with: connect a clip, or set it to 1."
            )
        file = host.new_output_file(filename_prefix) if save else None
        tensors, done = text_encoder_state_dict(full_clip, dtype=dtype)
        if strength != 1:
            tensors = mix_text_encoders(host.clip_l_tensors(clip), tensors, strength)
        # Refused before anything is written.
        swapped = host.replace_clip_l(clip, tensors) if clip is not None else None
        path = ""
        if file is not None:
            path = host.relative_to_output(write_safetensors(tensors, file, {"format": "pt"}))
            display.say(f"Saved output/{path}")
        for sentence in done:
            display.say(sentence)
        if swapped is None:
            swapped = host.clip_from_file(file) if file is not None else host.clip_from_tensors(tensors)
        return io.NodeOutput(swapped, path)


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
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, full_clip):
        require_clip_l(full_clip)
        merged = merge_text_encoder(host.clip_l_tensors(clip), full_clip, source="the connected CLIP")
        display = host.Display(cls.hidden.unique_id)
        for note in merged.notes:
            display.say(note)
        return io.NodeOutput(merged)


NODES = [LoadFullCLIP, FoldGmP, SaveFullCLIP, ExportClipL, MergeTEWithVision]
