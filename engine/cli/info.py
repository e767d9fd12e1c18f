"""`clip-finetune info`: what a model, dataset or run is, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..clip.architecture import is_assumption
from ..clip.health import BROKEN_MERGE, describe_text_encoder, not_numbers
from ..clip.load import find_model_source, kind_of, load_full_clip, model_in_folder
from ..clip.names import text_encoders_in
from ..clip.tensor_files import INDEX_SUFFIX, FileContents, read_contents
from ..data.dataset import ClipDataset
from ..data.load import load_dataset
from ..errors import UserError, one_line
from ..files import write_json
from ..report.tables import table
from .arguments import Commands, require_writable

_DATASET_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
_MOST_ITEMS, _MOST_ENTRIES = 10, 20  # shown of a list, of a mapping


def add_commands(commands: Commands) -> None:
    info = commands.add("info", run_info, "Show what a model, dataset or run is, and what is wrong with it.")
    info.add_argument("path", metavar="FILE_OR_FOLDER")
    info.add_argument("--json", metavar="FILE", help="also write the facts to FILE")


def run_info(arguments: argparse.Namespace) -> None:
    if arguments.json:
        require_writable(arguments.json, arguments.path)
    facts = describe(arguments.path, arguments.activation)
    if arguments.json:
        write_json(arguments.json, facts)
    print(as_text(facts))


def describe(path: str | os.PathLike, activation: str = "auto") -> dict[str, Any]:
    """Return the facts of `info --json`.

    `kind` is full_clip, text_encoder, vision_encoder, checkpoint, lora, training_state, run or dataset. To find broken
    images, every image of a dataset is decoded. Raises `UserError` for what cannot be read.
    """
    target = Path(path)
    if not os.path.exists(target) and "/" not in str(path):
        raise UserError(f"{path} does not exist; give a model file, a folder of images, or a run folder.")
    if os.path.isfile(target / "config.json") and os.path.isfile(target / "metrics.jsonl"):
        return _describe_run(target)
    if _is_model(target):
        return _describe_model(path, activation)
    return describe_dataset(load_dataset(path))


def _is_model(path: Path) -> bool:
    if os.path.isfile(path):
        return path.name.endswith(INDEX_SUFFIX) or path.suffix.lower() not in _DATASET_SUFFIXES
    return not os.path.exists(path) or model_in_folder(path) is not None


def _describe_model(path: str | os.PathLike, activation: str) -> dict[str, Any]:
    """Describe a model file; if it is not a full CLIP, as far as it is understood."""
    if os.path.exists(path):
        contents = read_contents(find_model_source(path).path)
        kind = kind_of(contents.tensors)
        if kind == "unknown":
            raise UserError(
                f"{path} is not a CLIP: it has neither a text tower nor a vision tower; choose another file."
            )
        if kind != "full_clip":
            return _describe_part(path, kind, contents)
    model = load_full_clip(path, activation=activation)
    assumed = [note for note in model.notes if is_assumption(note) or BROKEN_MERGE in note]
    return {
        "kind": "full_clip",
        "file": str(path),
        "architecture": model.architecture.as_dict(),
        "parameterization": model.parameterization,
        "dtype": ", ".join(model.dtypes),
        "tensors": len(model.state_dict),
        "parameters": sum(tensor.numel() for tensor in model.state_dict.values()),
        "provenance": dict(model.provenance),
        "notes": [note for note in model.notes if note not in assumed],
        "problems": assumed + not_numbers(model.state_dict),
    }


def _describe_part(path: str | os.PathLike, kind: str, contents: FileContents) -> dict[str, Any]:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in contents.tensors.values()})
    facts = {
        "kind": kind,
        "file": str(path),
        "tensors": len(contents.tensors),
        "dtype": ", ".join(dtypes),
        "notes": list(contents.notes),
    }
    if kind == "text_encoder":
        return facts | describe_text_encoder(contents.tensors)
    if kind == "checkpoint":
        widths = [
            f"{prefix or 'no prefix'}: {contents.tensors[tokens].shape[-1]} wide"
            for prefix, tokens in text_encoders_in(contents.tensors).items()
            if contents.tensors[tokens].ndim == 2
        ]
        return facts | {"text_encoders": widths, "problems": []}
    return facts | {"problems": not_numbers(contents.tensors)}


def describe_dataset(dataset: ClipDataset, context_length: int = 77) -> dict[str, Any]:
    """Describe a dataset; a caption counts as truncated if it is longer than `context_length` tokens."""
    from ..data.tools.findings import advice, caption_lengths
    from ..data.tools.inspect import inspect_dataset

    inspection = inspect_dataset(dataset, context_length=context_length)
    shortest, median, longest = caption_lengths(inspection)
    return {
        "kind": "dataset",
        "name": inspection.name,
        "format": inspection.format,
        "reason": inspection.reason,
        "images": inspection.images,
        "originals": inspection.originals,
        "captions": inspection.captions,
        "labels": len(inspection.classes),
        "caption_tokens": {"shortest": shortest, "median": median, "longest": longest},
        "truncated_captions": inspection.truncated_captions,
        "image_sizes": _typical_sizes(inspection.sizes.tolist()),
        "broken": [{"file": item.file, "reason": item.reason} for item in inspection.broken],
        "exact_duplicates": [list(group) for group in inspection.exact_duplicates],
        "near_duplicates": [list(group) for group in inspection.near_duplicates],
        "repeated_captions": [
            {"images": count, "caption": caption} for caption, count in inspection.repeated_captions.items()
        ],
        "without_captions": list(inspection.without_captions),
        "unnamed": list(inspection.unnamed),
        "classes": dict(inspection.classes),
        "notes": list(inspection.notes),
        "advice": [text.partition("\n")[0].rstrip(":") for text in advice(inspection)],
    }


def _typical_sizes(sizes: Sequence[Sequence[int]]) -> dict[str, str]:
    """Return the smallest, median and largest (width, height), by area."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    if not ordered:
        return {}
    typical = {"smallest": ordered[0], "middle": ordered[len(ordered) // 2], "largest": ordered[-1]}
    return {name: f"{width} x {height}" for name, (width, height) in typical.items()}


def _describe_run(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"The run in {folder} is damaged ({one_line(error)}); the weights in it can still be opened."
        ) from error
    is_run = isinstance(config, dict) and "identity" in config and isinstance(config.get("model", {}), dict)
    if not is_run or not all(isinstance(line, dict) for line in lines):
        raise UserError(
            f"{folder} has files named like those of a run, but another program wrote them; choose another folder."
        )
    steps = [line for line in lines if line.get("kind") == "step"]
    from_config = ("settings", "data", "groups", "device", "precision", "batch_size", "micro_batch", "versions")
    return {
        "kind": "run",
        "file": str(folder),
        "model": config.get("model", {}).get("provenance"),
        **{key: config.get(key) for key in from_config},
        "steps": len(steps),
        "total_steps": config.get("total_steps"),
        "last_loss": steps[-1].get("loss") if steps else None,
        "validations": [line for line in lines if line.get("kind") == "validation"],
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the facts for a reader: a line each, settings and groups as tables, long lists cut."""
    lines: list[str] = []
    for key, value in facts.items():
        title = key.replace("_", " ")
        if key == "settings" and isinstance(value, Mapping):
            rows = [
                {"setting": setting} | dict(entry) for setting, entry in value.items() if isinstance(entry, Mapping)
            ]
            lines += ["settings:", *_indented(table(rows))]
        elif key == "groups" and value:
            lines += ["groups:", *_indented(table(value))]
        elif isinstance(value, Mapping):
            lines += _mapping_lines(title, value)
        elif isinstance(value, list):
            lines += [f"{title}: {len(value)}", *(f"  {_item_text(item)}" for item in value[:_MOST_ITEMS])]
            lines += [f"  … and {len(value) - _MOST_ITEMS} more"] if len(value) > _MOST_ITEMS else []
        else:
            lines.append(f"{title}: {value}")
    return "\n".join(lines)


def _mapping_lines(name: str, values: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name}, {key}: " + ", ".join(f"{inner} {item}" for inner, item in value.items())
        for key, value in values.items()
        if isinstance(value, Mapping)
    ]
    flat = [
        f"{key} {'; '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in values.items()
        if not isinstance(value, Mapping)
    ]
    if len(flat) > _MOST_ENTRIES:
        flat[_MOST_ENTRIES:] = [f"… and {len(flat) - _MOST_ENTRIES} more"]
    return [*lines, f"{name}: {', '.join(flat)}"] if flat else lines


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _item_text(item: Any) -> str:
    if isinstance(item, list):
        return ", ".join(map(str, item[:5])) + (f", … and {len(item) - 5} more" if len(item) > 5 else "")
    if not isinstance(item, Mapping):
        return str(item)
    if "reason" in item:
        return f"{item['file']}: {item['reason']}"
    return ", ".join(f"{key} {_shortened(str(value))}" for key, value in item.items())


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"
