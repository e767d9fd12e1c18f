"""Write a full CLIP to files, in each of EXPORTS: the formats that the export command and the save nodes offer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from ..errors import UserError
from ..files import AnyPath
from ..notes import OnNote, ignore_note
from .encoders import text_encoder_state_dict, vision_encoder_state_dict
from .full_clip import FullCLIP, file_metadata
from .gmp import plain_weights, to_gmp
from .health import require_finite
from .huggingface import save_huggingface
from .lora import export_lora
from .tensor_files import MIXED, cast, require_safetensors_path, write_safetensors


def save_full_clip(full_clip: FullCLIP, path: AnyPath, *, dtype: str | None = None) -> Path:
    """Write a full CLIP under OpenAI's names (GmP's if it is in GmP form), with its architecture in the metadata.

    `dtype` is fp16, bf16, fp32 or mixed; None keeps each tensor's own. The file is read back and compared before it
    replaces an older one. Raises `UserError`, also for weights that are not finite.
    """
    require_finite(full_clip, f"{path} was not written")
    return write_safetensors(cast(full_clip.state_dict, dtype, path), path, file_metadata(full_clip))


def export_text_encoder(
    full_clip: FullCLIP, path: AnyPath, *, dtype: str | None = "fp16", on_note: OnNote = ignore_note
) -> Path:
    """Write the text tower as ComfyUI, diffusers, Forge and kohya load it; read back and compared likewise."""
    return write_safetensors(text_encoder_state_dict(full_clip, dtype=dtype, on_note=on_note), path, {"format": "pt"})


def export_vision_encoder(
    full_clip: FullCLIP, path: AnyPath, *, dtype: str | None = "fp16", on_note: OnNote = ignore_note
) -> Path:
    """Write the vision tower as ComfyUI's CLIPVisionLoader loads it; read back and compared likewise."""
    return write_safetensors(vision_encoder_state_dict(full_clip, dtype=dtype, on_note=on_note), path, {"format": "pt"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export may need besides the model and the path. `dtype` None keeps each tensor's own."""

    dtype: str | None
    baseline: FullCLIP | None
    rank: int
    on_note: OnNote
    on_progress: Callable[[int, int], None]
    check_cancelled: Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format that a full CLIP can be exported to.

    `help` is half a sentence. `default_dtype` None keeps each tensor's own; `mixed`: the dtype `mixed` is possible.
    `text_only`: only the text tower is written, for which there are nodes other than Save Full CLIP. `needs_baseline`:
    the difference to another model is written. `folder`: the output is a folder, not a file.
    """

    help: str
    write: Callable[[FullCLIP, Path, ExportOptions], object]
    default_dtype: str | None = None
    mixed: bool = False
    text_only: bool = False
    needs_baseline: bool = False
    folder: bool = False


def _write_lora(full_clip: FullCLIP, path: Path, options: ExportOptions) -> None:
    assert options.baseline is not None and options.dtype is not None, "check_export and the default see to it"
    report = export_lora(
        full_clip,
        options.baseline,
        path,
        rank=options.rank,
        dtype=options.dtype,
        on_progress=options.on_progress,
        check_cancelled=options.check_cancelled,
    )
    for note in (*report.notes, report.sentence):
        options.on_note(note)


EXPORTS: Mapping[str, ExportFormat] = MappingProxyType(
    {
        "text": ExportFormat(
            help="the text tower alone, for ComfyUI, diffusers, Forge and kohya",
            write=lambda model, path, o: export_text_encoder(model, path, dtype=o.dtype, on_note=o.on_note),
            default_dtype="fp16",
            text_only=True,
        ),
        "openai": ExportFormat(
            help="plain weights in one file, to load here again, or in open_clip",
            write=lambda model, path, o: save_full_clip(plain_weights(model, o.on_note), path, dtype=o.dtype),
            mixed=True,
        ),
        "huggingface": ExportFormat(
            help="a folder that transformers and diffusers open, with tokenizer",
            write=lambda model, path, o: save_huggingface(model, path, dtype=o.dtype, on_note=o.on_note),
            folder=True,
        ),
        "vision": ExportFormat(
            help="the vision tower alone, for Load CLIP Vision",
            write=lambda model, path, o: export_vision_encoder(model, path, dtype=o.dtype, on_note=o.on_note),
            default_dtype="fp16",
        ),
        "gmp": ExportFormat(
            help="in GmP form, to train on with it",
            write=lambda model, path, o: save_full_clip(to_gmp(model), path, dtype=o.dtype),
            mixed=True,
        ),
        "lora": ExportFormat(
            help="what the text tower has over the baseline's, as a LoRA",
            write=_write_lora,
            default_dtype="fp16",
            text_only=True,
            needs_baseline=True,
        ),
    }
)


def export(
    full_clip: FullCLIP,
    path: AnyPath,
    *,
    format: str,
    dtype: str | None = None,
    baseline: FullCLIP | None = None,
    rank: int = 32,
    on_note: OnNote = ignore_note,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Path:
    """Write a full CLIP in one of EXPORTS; the file or folder appears whole, after it was read back and compared.

    `dtype` None is the format's default. `baseline`, `rank`, `on_progress(done, total)` and `check_cancelled`, which
    raises to stop, are for a LoRA. Raises `UserError`.
    """
    check_export(path, format=format, dtype=dtype, with_baseline=baseline is not None)
    chosen = EXPORTS[format]
    options = ExportOptions(
        dtype=dtype or chosen.default_dtype,
        baseline=baseline,
        rank=rank,
        on_note=on_note,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
    )
    chosen.write(full_clip, Path(path), options)
    return Path(path)


def check_export(path: AnyPath, *, format: str, dtype: str | None, with_baseline: bool) -> None:
    """Raise `UserError` if `export` could not use these arguments, before a model is opened for it."""
    if format not in EXPORTS:
        raise UserError(f"The format {format!r} is not known; choose one of {', '.join(EXPORTS)}.")
    chosen = EXPORTS[format]
    if dtype == MIXED and not chosen.mixed:
        others = " and ".join(name for name, other in EXPORTS.items() if other.mixed)
        raise UserError(f"The dtype {MIXED} is only for the formats {others}; for {format} choose fp16, bf16 or fp32.")
    if chosen.needs_baseline and not with_baseline:
        raise UserError(f"The format {format} needs a baseline (--baseline), the model that this one was trained from.")
    if with_baseline and not chosen.needs_baseline:
        raise UserError(f"The format {format} takes no baseline (--baseline); only the format lora does.")
    if not chosen.folder:
        require_safetensors_path(path)
