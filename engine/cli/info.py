"""What a model file, a data set or a run is, and what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
from ..report.tables import table

_DATASET_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
_SHOWN = 20  # of what is not a list


def describe(path: str | os.PathLike, activation: str = "auto") -> dict[str, Any]:
    """The facts of `info --json`; `kind` is full_clip, text_encoder, vision_encoder, checkpoint, lora, training_state,
    run or dataset.

    Every picture of a data set is decoded to find the broken ones. Raises `UserError` for what cannot be read.
    """
    place = Path(path)
    if not os.path.exists(place) and "/" not in str(path):
        raise UserError(f"{path} does not exist; give a model file, a folder of pictures, or a run folder.")
    if os.path.isfile(place / "config.json") and os.path.isfile(place / "metrics.jsonl"):
        return _describe_run(place)
    if _is_model(place):
        return _describe_model(path, activation)
    return describe_dataset(load_dataset(path))


def _is_model(place: Path) -> bool:
    if os.path.isfile(place):
        return place.name.endswith(INDEX_SUFFIX) or place.suffix.lower() not in _DATASET_SUFFIXES
    return not os.path.exists(place) or model_in_folder(place) is not None


def _describe_model(path: str | os.PathLike, activation: str) -> dict[str, Any]:
    """The facts of a model file; those of another kind than a full CLIP in as far as they are known."""
    if os.path.exists(path):
        contents = read_contents(find_model_source(path).path)
        kind = kind_of(contents.tensors).name
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
        found = text_encoders_in(contents.tensors)
        widths = [
            f"{prefix or 'no prefix'}: {contents.tensors[tokens].shape[-1]} wide"
            for prefix, tokens in found.items()
            if contents.tensors[tokens].ndim == 2
        ]
        return facts | {"text_encoders": widths, "problems": []}
    return facts | {"problems": not_numbers(contents.tensors)}


def describe_dataset(dataset: ClipDataset, context_length: int = 77) -> dict[str, Any]:
    """The facts of a data set; a caption is counted as truncated if it is longer than `context_length` tokens."""
    from ..data.tools.findings import advice, caption_lengths
    from ..data.tools.inspect import inspect_dataset

    found = inspect_dataset(dataset, context_length=context_length)
    shortest, median, longest = caption_lengths(found)
    facts = {
        "kind": "dataset",
        "name": found.name,
        "format": found.format,
        "reason": found.reason,
        "images": found.images,
        "originals": found.originals,
        "captions": found.captions,
        "labels": len(found.classes),
        "caption_tokens": {"shortest": shortest, "median": median, "longest": longest},
        "truncated_captions": found.truncated_captions,
        "image_sizes": _sizes(found.sizes.tolist()),
        "broken": [{"file": item.file, "reason": item.reason} for item in found.broken],
        "exact_duplicates": [list(group) for group in found.exact_duplicates],
        "near_duplicates": [list(group) for group in found.near_duplicates],
        "repeated_captions": [{"pictures": n, "caption": text} for text, n in found.repeated_captions.items()],
        "without_captions": list(found.without_captions),
        "unnamed": list(found.unnamed),
        "classes": dict(found.classes),
        "notes": list(found.notes),
    }
    return facts | {"advice": [words.partition("\n")[0].rstrip(":") for words in advice(found)]}


def _sizes(sizes: list[list[int]]) -> dict[str, str]:
    """The smallest, middle and largest of (width, height), by area."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    if not ordered:
        return {}
    chosen = {"smallest": ordered[0], "middle": ordered[len(ordered) // 2], "largest": ordered[-1]}
    return {name: f"{width} x {height}" for name, (width, height) in chosen.items()}


def _describe_run(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{folder} holds a damaged run ({one_line(error)}); the weights in it can still be opened."
        ) from error
    sound = isinstance(config, dict) and "identity" in config and isinstance(config.get("model", {}), dict)
    if not sound or not all(isinstance(line, dict) for line in lines):
        raise UserError(
            f"{folder} holds files with the names of a run's, but they are another program's; choose another folder."
        )
    steps = [line for line in lines if line.get("kind") == "step"]
    return {
        "kind": "run",
        "file": str(folder),
        "settings": config.get("settings"),
        "model": config.get("model", {}).get("provenance"),
        "data": config.get("data"),
        "groups": config.get("groups"),
        "device": config.get("device"),
        "precision": config.get("precision"),
        "batch_size": config.get("batch_size"),
        "micro_batch": config.get("micro_batch"),
        "versions": config.get("versions"),
        "steps": len(steps),
        "total_steps": config.get("total_steps"),
        "last_loss": steps[-1].get("loss") if steps else None,
        "validations": [line for line in lines if line.get("kind") == "validation"],
    }


def in_words(facts: Mapping[str, Any]) -> str:
    """The same facts for a reader: one line each, tables for settings and groups, other lists cut after ten."""
    lines = []
    for name, value in facts.items():
        words = name.replace("_", " ")
        if name == "settings" and isinstance(value, Mapping):
            rows = [{"setting": key} | dict(entry) for key, entry in value.items() if isinstance(entry, Mapping)]
            lines += ["settings:", *_indented(table(rows))]
        elif name == "groups" and value:
            lines += ["groups:", *_indented(table(value))]
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if isinstance(inner, Mapping):
                    lines.append(f"{words}, {key}: " + ", ".join(f"{k} {v}" for k, v in inner.items()))
            flat = [f"{key} {_joined(inner)}" for key, inner in value.items() if not isinstance(inner, Mapping)]
            flat = flat[:_SHOWN] + ([f"… and {len(flat) - _SHOWN} more"] if len(flat) > _SHOWN else [])
            lines += [f"{words}: {', '.join(flat)}"] if flat else []
        elif isinstance(value, list):
            lines.append(f"{words}: {len(value)}")
            lines += [f"  {_item(item)}" for item in value[:10]]
            lines += [f"  … and {len(value) - 10} more"] if len(value) > 10 else []
        else:
            lines.append(f"{words}: {value}")
    return "\n".join(lines)


def _joined(value: Any) -> Any:
    return "; ".join(map(str, value)) if isinstance(value, list) else value


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _item(item: Any) -> str:
    if isinstance(item, list):
        return ", ".join(map(str, item[:5])) + (f", … and {len(item) - 5} more" if len(item) > 5 else "")
    if not isinstance(item, Mapping):
        return str(item)
    return (
        f"{item['file']}: {item['reason']}"
        if "reason" in item
        else ", ".join(f"{k} {_short(v)}" for k, v in item.items())
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
