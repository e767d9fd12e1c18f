"""`clip-finetune fold`, `export` and `merge`: from model files to model files."""

from __future__ import annotations

import argparse

from ..clip.exports import EXPORTS, check_export, export, save_full_clip
from ..clip.full_clip import FullCLIP
from ..clip.health import require_finite
from ..clip.tensor_files import require_safetensors_path
from ..errors import UserError
from .arguments import Commands, add_context_length, open_model
from .terminal import print_line, print_notes


def add_commands(commands: Commands) -> None:
    fold = commands.add("fold", run_fold, "Turn a model in GmP form back into one with plain weights.")
    fold.add_argument("input", metavar="IN.safetensors")
    fold.add_argument("output", metavar="OUT.safetensors")

    export_parser = commands.add(
        "export", run_export, "Write a model for other programs: its text encoder, or --format."
    )
    export_parser.add_argument("input", metavar="IN")
    export_parser.add_argument("output", metavar="OUT", help="a .safetensors file; for huggingface, a new folder")
    formats = " ".join(f"{name}: {record.help}." for name, record in EXPORTS.items())
    export_parser.add_argument("--format", choices=list(EXPORTS), default="text", help=f"{formats} Default: text.")
    export_parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32", "mixed"),
        help="default: fp16 for text, vision and lora, else the model's own; mixed (openai, gmp): OpenAI's layout",
    )
    export_parser.add_argument("--baseline", metavar="M", help="for lora: the model that this one was trained from")
    export_parser.add_argument("--rank", type=int, default=32, help="for lora: higher keeps more (default: 32)")

    merge = commands.add("merge", run_merge, "Put a text encoder, a vision encoder or both into a full CLIP.")
    merge.add_argument("--text", metavar="TE.safetensors", help="a text encoder, or a checkpoint that contains one")
    merge.add_argument("--vision", metavar="VISION.safetensors", help="a file for ComfyUI's Load CLIP Vision")
    merge.add_argument("--model", required=True, metavar="FULL", help="the full CLIP, which gives the rest")
    merge.add_argument("output", metavar="OUT.safetensors")
    for command in (fold, export_parser, merge):
        add_context_length(command)


def run_fold(arguments: argparse.Namespace) -> None:
    from ..clip.gmp import fold_gmp

    require_safetensors_path(arguments.output)
    folded = fold_gmp(_open_finite_model(arguments, arguments.input))
    print_notes(folded.notes)
    print_line(f"Wrote {save_full_clip(folded, arguments.output)}.")


def run_export(arguments: argparse.Namespace) -> None:
    format, output, dtype = arguments.format, arguments.output, arguments.dtype
    check_export(output, format=format, dtype=dtype, with_baseline=bool(arguments.baseline))
    model = _open_finite_model(arguments, arguments.input)
    print_notes(model.notes)
    baseline = _open_finite_model(arguments, arguments.baseline) if arguments.baseline else None
    print_notes(baseline.notes if baseline else ())
    export(model, output, format=format, dtype=dtype, baseline=baseline, rank=arguments.rank, on_note=print_line)
    print_line(f"Wrote {output}.")


def _open_finite_model(arguments: argparse.Namespace, source: str) -> FullCLIP:
    """Open a model to make a file from; errors about its weights name the file as it was given."""
    model = open_model(arguments, source)
    require_finite(model, f"{arguments.output} was not written", file=source)
    return model


def run_merge(arguments: argparse.Namespace) -> None:
    from ..clip.merge import Tower, keeps, merge_text_encoder, merge_vision_encoder

    if not arguments.text and not arguments.vision:
        raise UserError("merge needs --text, --vision or both: what to put into the full CLIP.")
    require_safetensors_path(arguments.output)
    merged = open_model(arguments, arguments.model)
    towers: dict[Tower, str | None] = {"text": arguments.text, "vision": arguments.vision}
    require_finite(
        merged,
        f"{arguments.output} was not written",
        file=arguments.model,
        matters=lambda name: all(keeps(name, tower) for tower, encoder in towers.items() if encoder),
    )
    if arguments.text:
        merged = merge_text_encoder(arguments.text, merged)
    if arguments.vision:
        merged = merge_vision_encoder(arguments.vision, merged)
    print_notes(merged.notes)
    print_line(f"Wrote {save_full_clip(merged, arguments.output)}.")
