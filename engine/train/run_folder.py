"""The folder of one run: what is in it, which folder a run gets, and how its state survives a crash.

Every file is written beside its place and moved there; `last.json`, which names the newest complete state, moves last.
A run's identity (settings, model, data) is in its `config.json`: the same name with the same identity goes on, another
identity gets the next free folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..clip.files import PART_SUFFIX, read_tensors, write_json, write_safetensors
from ..errors import UserError

ON_EXISTING = ("auto", "resume", "restart", "fail")
STATE_KEY = "clip_finetune_state"
_STATE_FILE = re.compile(r"^step_(\d+)\.safetensors$")


@dataclasses.dataclass
class RunFolder:
    """One run's files. `path` exists once the run was claimed."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best_file(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def chart_file(self) -> Path:
        return self.path / "chart.png"

    @property
    def pointer_file(self) -> Path:
        return self.path / "last.json"

    def identity(self) -> dict[str, Any] | None:
        """The identity of the run that lives here; None if none does."""
        return self._read_json(self.config_file).get("identity") if self.config_file.is_file() else None

    # ---- state -----------------------------------------------------------------------------------------------------

    def save_state(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], keep: int) -> None:
        """Write the state after optimizer step `step`, point `last.json` at it, then remove all but `keep` states."""
        file = self.path / f"step_{step}.safetensors"
        write_safetensors(tensors, file, {STATE_KEY: json.dumps(info)})
        write_json(self.pointer_file, {"file": file.name, "step": step})
        for old in self._states()[keep:]:
            old.unlink(missing_ok=True)

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and info of the state that `last.json` names; None if there is none."""
        if not self.pointer_file.is_file():
            return None
        file = self.path / str(self._read_json(self.pointer_file).get("file"))
        if not _STATE_FILE.match(file.name) or not file.is_file():
            return None
        tensors, metadata = read_tensors(file)
        return tensors, json.loads(metadata[STATE_KEY])

    def _states(self) -> list[Path]:
        """State files, the newest step first."""
        found = [(int(match[1]), file) for file in self.path.iterdir() if (match := _STATE_FILE.match(file.name))]
        return [file for _, file in sorted(found, reverse=True)]

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def metrics_bytes(self) -> int:
        return self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget the lines after byte `size`: what came after the state that the run goes on from."""
        if self.metrics_bytes() > size:
            os.truncate(self.metrics_file, size)

    # ---- clearing --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove this run's files (and only those)."""
        mine = (self.pointer_file, self.config_file, self.metrics_file, self.best_file, self.chart_file)
        for file in (*mine, *self._states()):
            file.unlink(missing_ok=True)
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove half-written files that a crash left behind."""
        for part in self.path.glob(f".*{PART_SUFFIX}"):
            part.unlink(missing_ok=True)

    def _read_json(self, file: Path) -> dict[str, Any]:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); choose another run name, or delete that folder."
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{file} is not what a run writes; choose another run name, or delete that folder.")
        return value


def claim_run_folder(folder: Path, identity: Mapping[str, Any], on_existing: str) -> tuple[RunFolder, list[str]]:
    """The folder that a run with this identity works in, and sentences on the choice.

    auto: this folder if it is free or holds the same run, else the next free `name_2`, `name_3`, …; resume: this
    folder, whose run must be the same; restart: this folder, emptied of its run; fail: only a free folder.
    """
    run = RunFolder(folder)
    if on_existing not in ON_EXISTING:
        raise UserError(f"on_existing is {on_existing!r}; choose {' or '.join(ON_EXISTING)}.")
    if on_existing == "auto":
        return _first_fitting(folder, identity)
    if on_existing == "fail" and not _is_free(folder):
        raise UserError(f"{folder} already holds something; choose another run name.")
    if on_existing == "restart" and not _is_free(folder):
        if run.identity() is None:
            raise UserError(f"{folder} holds files that are not a run; choose another run name, nothing was deleted.")
        run.clear()
        return run, [f"The earlier run in {folder} was deleted, as asked."]
    if on_existing == "resume" and not _is_free(folder):
        found = run.identity()
        if found is None:
            raise UserError(f"{folder} holds files that are not a run; choose the folder of the run to resume.")
        different = differences(found, identity)
        if different:
            raise UserError(
                f"The run in {folder} cannot be resumed because something has changed: {'; '.join(different)}. Set it "
                "back, or choose another run name."
            )
    return run, []


def _first_fitting(folder: Path, identity: Mapping[str, Any]) -> tuple[RunFolder, list[str]]:
    notes: list[str] = []
    number, candidate = 1, folder
    while not _is_free(candidate):
        found = RunFolder(candidate).identity()
        different = ["it holds other files"] if found is None else differences(found, identity)
        if not different:
            break
        number += 1
        candidate = folder.with_name(f"{folder.name}_{number}")
        if number == 2:
            notes = [f"{folder.name} is left as it is ({'; '.join(different)})"]
    if notes:
        notes = [f"{notes[0]}; this run is in {candidate.name}."]
    return RunFolder(candidate), notes


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    words = []
    for part, name in (("model", "the model"), ("train", "the training data"), ("validation", "the validation data")):
        if found.get(part) != wanted.get(part):
            words.append(f"{name} changed")
    before, now = found.get("settings", {}), wanted.get("settings", {})
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            words.append(f"{name} was {before.get(name)} and is {now.get(name)}")
    return words
