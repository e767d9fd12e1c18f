"""What a model file, a data set or a run is, and what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .clip.architecture import is_assumption
from .clip.full_clip import kind_of, load_full_clip
from .clip.health import BROKEN_MERGE, describe_text_encoder, not_numbers
from .clip.names import text_encoders_in
from .clip.reading import INDEX_SUFFIX, Contents, read_contents
from .clip.sources import find_source, holds_a_model
from .data.dataset import ClipDataset, load_dataset
from .errors import UserError
from .report.tables import table

_DATASET_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_VOCABULARY = 49408


def describe(path: str | os.PathLike, activation: str = "auto") -> dict[str, Any]:
    """The facts of `info --json`; `kind` is full_clip, text_encoder, vision_encoder, checkpoint, lora, training_state,
    run or dataset.

    Every picture of a data set is decoded to find the broken ones. Raises `UserError` for what cannot be read.
    """
    place = Path(path)
    if not place.exists() and "/" not in str(path):
        raise UserError(f"{path} does not exist; give a model file, a folder of pictures, or a run folder.")
    if (place / "config.json").is_file() and (place / "metrics.jsonl").is_file():
        return _describe_run(place)
    if _is_model(place):
        return _describe_model(path, activation)
    return describe_dataset(load_dataset(path))


def _is_model(place: Path) -> bool:
    if place.is_file():
        return place.name.endswith(INDEX_SUFFIX) or place.suffix.lower() not in _DATASET_SUFFIXES
    return not place.exists() or holds_a_model(place)


def _describe_model(path: str | os.PathLike, activation: str) -> dict[str, Any]:
    """The facts of a model file; those of another kind than a full CLIP in as far as they are known."""
    if Path(path).exists():
        contents = read_contents(find_source(path).path)
        kind = kind_of(contents.tensors)
        if kind == "unknown":
            raise UserError(f"{path} is not a CLIP: it has neither a text tower nor a vision tower.")
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


def _describe_part(path: str | os.PathLike, kind: str, contents: Contents) -> dict[str, Any]:
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
            f"{prefix or 'no prefix'}: {contents.tensors[tokens].shape[-1]} wide" for prefix, tokens in found.items()
        ]
        return facts | {"text_encoders": widths, "problems": []}
    return facts | {"problems": not_numbers(contents.tensors)}


def describe_dataset(dataset: ClipDataset, context_length: int = 77) -> dict[str, Any]:
    """The facts of a data set; a caption is counted as truncated if it is longer than `context_length` tokens."""
    from .data.images import BrokenImage, load_image
    from .data.loader import in_threads
    from .data.tokens import Tokenizer

    tokenizer = Tokenizer(context_length, _VOCABULARY)
    missing = set(dataset.missing())
    broken = [{"file": dataset.names[index], "reason": "the file is not there"} for index in sorted(missing)]

    def reason(index: int) -> tuple[int, str | None]:
        try:
            load_image(dataset.path(index), 32)
        except BrokenImage as error:
            return index, str(error)
        return index, None

    there = (index for index in range(len(dataset)) if index not in missing)
    broken += [
        {"file": dataset.names[index], "reason": why} for index, why in in_threads(reason, there) if why is not None
    ]
    return {
        "kind": "dataset",
        "name": dataset.name,
        "format": dataset.format,
        "reason": dataset.reason,
        "images": len(dataset),
        "captions": sum(len(captions) for captions in dataset.captions),
        "labels": len(dataset.class_names),
        "truncated_captions": sum(tokenizer.truncated(text) for captions in dataset.captions for text in captions),
        "broken": broken,
        "notes": list(dataset.notes),
    }


def _describe_run(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} holds a damaged run ({error}); the weights in it can still be opened.") from error
    if not isinstance(config, dict) or "identity" not in config or not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{folder} holds files with the names of a run's, but they are another program's.")
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
            flat = [f"{key} {inner}" for key, inner in value.items() if not isinstance(inner, Mapping)]
            lines += [f"{words}: {', '.join(flat)}"] if flat else []
        elif isinstance(value, list):
            lines.append(f"{words}: {len(value)}")
            lines += [f"  {_item(item)}" for item in value[:10]]
            lines += [f"  … and {len(value) - 10} more"] if len(value) > 10 else []
        else:
            lines.append(f"{words}: {value}")
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _item(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    return f"{item['file']}: {item['reason']}" if "reason" in item else ", ".join(f"{k} {v}" for k, v in item.items())
