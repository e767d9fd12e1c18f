"""The folder of one run: what is in it, which folder a run gets, and how its state survives a crash.

Every file is written beside its place and moved there; `last.json`, which names the newest complete state, moves last.
A run's identity (settings, model, data) is in its `config.json`: the same name with the same identity goes on, another
identity gets the next free folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...clip.tensor_files import read_contents, write_safetensors
from ...errors import UserError
from ...files import PART_SUFFIX, remove_parts, write_json, write_text
from ..config import TrainConfig
from .lock import LOCK_NAME, FolderLock, lock_folder
from .results import REPORT

ON_EXISTING = ("auto", "resume", "restart", "fail")
STATE_KEY = "clip_finetune_state"
_STATE_FILE = re.compile(r"^step_(\d+)\.safetensors$")


@dataclasses.dataclass
class RunFolder:
    """One run's files. `path` exists once the run was claimed."""

    path: Path
    lock: FolderLock | None = None

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

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
    def report_file(self) -> Path:
        return self.path / REPORT

    @property
    def pointer_file(self) -> Path:
        return self.path / "last.json"

    def config(self) -> dict[str, Any]:
        """What config.json says; nothing if it is not there."""
        return self._read_json(self.config_file) if self.config_file.is_file() else {}

    def identity(self) -> dict[str, Any] | None:
        """The identity of the run that lives here; None if none does."""
        found = self.config().get("identity")
        return found if isinstance(found, dict) else None

    def has_newest_report(self) -> bool:
        """Whether the report was written after the newest state, and not before a crash came between the two."""
        if not self.report_file.is_file() or not self.pointer_file.is_file():
            return False
        return self.report_file.stat().st_mtime_ns >= self.pointer_file.stat().st_mtime_ns

    # ---- state -----------------------------------------------------------------------------------------------------

    def save_state(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], keep: int) -> None:
        """Write the state after optimizer step `step`, point `last.json` at it, then remove all but the newest `keep`
        states up to it, and any later one: a crash left that before the pointer moved."""
        file = self.path / f"step_{step}.safetensors"
        write_safetensors(tensors, file, {STATE_KEY: json.dumps(info)})
        write_json(self.pointer_file, {"file": file.name, "step": step})
        kept = [state for state in self._states() if _step_of(state) <= step][:keep]
        for state in set(self._states()) - set(kept):
            state.unlink(missing_ok=True)

    def load_state(self, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and info of the state that `last.json` names, else of the newest older one that is whole; None if
        there is none. What had to be passed over is said."""
        for file in self._states_to_try():
            try:
                contents = read_contents(file)
                return contents.tensors, json.loads(contents.metadata[STATE_KEY])
            except (UserError, KeyError, ValueError) as error:
                say(f"The saved state {file.name} cannot be used ({error}); the one before it is tried.")
        if self.pointer_file.is_file():
            say("No saved state of this run is left; it begins again from its first step.")
        return None

    def _states_to_try(self) -> list[Path]:
        if not self.pointer_file.is_file():
            return []
        named = str(self._read_json(self.pointer_file).get("file"))
        match = _STATE_FILE.match(named)
        # A state newer than the pointer's was written whole, but the crash came before all that belongs to it.
        return [file for file in self._states() if match and _step_of(file) <= int(match[1])]

    def _states(self) -> list[Path]:
        """State files, the newest step first."""
        found = [file for file in self.path.iterdir() if _STATE_FILE.match(file.name)]
        return sorted(found, key=_step_of, reverse=True)

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to metrics.jsonl, all of them or none; raises `UserError` where that cannot be done."""
        before = self.metrics_bytes()
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            if self.metrics_bytes() > before:
                os.truncate(self.metrics_file, before)
            raise UserError(
                f"{self.metrics_file} could not be written ({error.strerror}); free some space or choose a folder that "
                "you can write to, and start the same run again: it goes on from its last saved state."
            ) from error

    def sync_metrics(self) -> None:
        """Make sure that the lines so far are on the disk, so that a state never speaks of lines that a crash took."""
        if self.metrics_file.is_file():
            with open(self.metrics_file, "rb+") as file:
                os.fsync(file.fileno())

    def rewrite_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl anew."""
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in records))

    def is_whole(self) -> bool:
        """Whether the files that a run begins with are still there."""
        return self.config_file.is_file() and self.metrics_file.is_file()

    def metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return []
        lines = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # a crash may leave half a line
                break
        return lines

    def metrics_bytes(self) -> int:
        return self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget the lines after byte `size`: what came after the state that the run goes on from. The file is there
        afterwards, and ends with a whole line."""
        self.log([])
        text = self.metrics_file.read_bytes()[:size]
        os.truncate(self.metrics_file, text.rfind(b"\n") + 1)

    # ---- clearing --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove this run's files (and only those)."""
        shown = (self.chart_file, self.report_file)
        mine = (self.pointer_file, *self._states(), self.metrics_file, self.best_file, *shown)
        for file in (*mine, self.config_file):  # last, so that a folder that is half cleared still is a run's
            file.unlink(missing_ok=True)
        remove_parts(self.path)

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


def _step_of(state_file: Path) -> int:
    return int(state_file.stem.removeprefix("step_"))


def claim_run_folder(
    folder: Path, identity: Mapping[str, Any], on_existing: str, say: Callable[[str], None]
) -> RunFolder:
    """The folder that a run with this identity works in, locked; the choice is said.

    auto: this folder if it is free or holds the same run, else the next free `name_2`, `name_3`, …; resume: this
    folder, whose run must be the same; restart: this folder, emptied of its run; fail: only a free folder. Raises
    `UserError` for a folder that another training is working in.
    """
    if on_existing not in ON_EXISTING:
        raise UserError(f"on_existing is {on_existing!r}; choose {' or '.join(ON_EXISTING)}.")
    if on_existing == "auto":
        return _first_fitting(folder, identity, say)
    if on_existing == "fail" and not _is_free(folder):
        raise UserError(f"{folder} already holds something; choose another run name.")
    run = _locked(folder, say)
    if run is None:
        raise _is_busy(folder)
    try:
        if on_existing != "fail" and not _is_free(folder):
            _enter(run, identity, on_existing, say)
    except BaseException:
        run.release()
        raise
    return run


def _enter(run: RunFolder, identity: Mapping[str, Any], on_existing: str, say: Callable[[str], None]) -> None:
    """Begin to work in a folder that is not free, as an explicit choice of the user."""
    found = run.identity()
    if on_existing == "restart":
        if found is None:
            raise UserError(f"{run.path} holds files that are not a run; choose another run name, nothing was deleted.")
        run.clear()
        say(f"The earlier run in {run.path} was deleted, as asked.")
        return
    if found is None:
        raise UserError(f"{run.path} holds files that are not a run; choose the folder of the run to resume.")
    different = differences(found, identity)
    if different:
        raise UserError(
            f"The run in {run.path} cannot be resumed because something has changed: {'; '.join(different)}. Set it "
            "back, or choose another run name."
        )


def _first_fitting(folder: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> RunFolder:
    why = ""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        run = _locked(candidate, say)
        different = _in_the_way(candidate, identity, busy=run is None)
        if not different:
            if why:
                say(f"{folder.name} is left as it is ({why}); this run is in {candidate.name}.")
            return run
        why = why or "; ".join(different)
        if run is not None:
            run.release()


def _in_the_way(folder: Path, identity: Mapping[str, Any], *, busy: bool) -> list[str]:
    """Why a run cannot work in a folder, in words; raises `UserError` if the same run is at work there now."""
    if not busy and _is_free(folder):
        return []
    found = RunFolder(folder).identity()
    different = ["it holds other files"] if found is None else differences(found, identity)
    if busy and found is None:
        return ["another training is beginning there"]
    if busy and not different:
        raise _is_busy(folder)
    return different


def _locked(folder: Path, say: Callable[[str], None]) -> RunFolder | None:
    lock = lock_folder(folder, say)
    return None if lock is None else RunFolder(folder, lock)


def _is_busy(folder: Path) -> UserError:
    return UserError(
        f"Another training is working in {folder} at this moment; wait until it ends, stop it, or choose another run "
        "name."
    )


def _is_free(folder: Path) -> bool:
    """Whether nothing is in a folder but what a training that was killed at its very beginning leaves."""
    if not folder.is_dir():
        return not folder.exists()
    return all(file.name == LOCK_NAME or file.name.endswith(PART_SUFFIX) for file in folder.iterdir())


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words. A setting that an older run does not know had its default."""
    words = []
    for part, name in (("model", "the model"), ("train", "the training data"), ("validation", "the validation data")):
        if found.get(part) != wanted.get(part):
            words.append(f"{name} changed")
    now = wanted.get("settings", {})
    before = TrainConfig().identity | found.get("settings", {})
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            words.append(f"{name} was {before.get(name)} and is {now.get(name)}")
    return words
