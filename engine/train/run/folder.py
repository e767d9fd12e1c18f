"""The folder of a run: its files, which folder a run gets, and how its checkpoints survive a crash.

Every file is written beside its destination and moved there; `last.json`, which names the newest complete checkpoint,
moves last. A run's identity (settings, model, data) is in its `config.json`: the same name with the same identity
resumes, another identity gets the next free folder.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...clip.tensor_files import read_contents, write_safetensors
from ...errors import UserError
from ...files import PART_SUFFIX, remove_parts, write_json, write_text
from .checkpoints import Checkpoint
from .lock import LOCK_NAME, FolderLock, lock_folder

ON_EXISTING = ("auto", "resume", "restart", "fail")
STATE_KEY = "clip_finetune_state"
REPORT = "report.html"
_CHECKPOINT = re.compile(r"^step_(\d+)\.safetensors$")


class RunFolder:
    """The files of one run. The folder at `path` exists once the run was claimed."""

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        self.path, self._lock = path, lock
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.best_file = path / "best.safetensors"
        self.chart_file = path / "chart.png"
        self.report_file = path / REPORT
        self.pointer_file = path / "last.json"

    def release(self) -> None:
        """Let other trainings have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def config(self) -> dict[str, Any]:
        """Return what config.json says; empty if there is none."""
        return _read_json(self.config_file) if self.config_file.is_file() else {}

    def identity(self) -> dict[str, Any] | None:
        """Return the identity of the run in this folder; None if there is no run."""
        identity = self.config().get("identity")
        return identity if isinstance(identity, dict) else None

    def has_newest_report(self) -> bool:
        """Return whether the report is newer than the newest checkpoint; a crash may have come between the two."""
        if not self.report_file.is_file() or not self.pointer_file.is_file():
            return False
        return self.report_file.stat().st_mtime_ns >= self.pointer_file.stat().st_mtime_ns

    def is_whole(self) -> bool:
        """Return whether the files that a run starts with are still there."""
        return self.config_file.is_file() and self.metrics_file.is_file()

    def clear(self) -> None:
        """Remove the files of this run, and no others."""
        files = [self.pointer_file, *self._checkpoints(), self.metrics_file, self.best_file]
        files += [self.chart_file, self.report_file]
        for file in (*files, self.config_file):  # last, so that a folder that is half cleared is still a run's
            file.unlink(missing_ok=True)
        remove_parts(self.path)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint and point `last.json` at it, then remove all but the newest `keep` up to it.

        A later one is removed too: a crash left it before the pointer moved.
        """
        file = self.path / f"step_{checkpoint.step}.safetensors"
        write_safetensors(checkpoint.state.tensors, file, {STATE_KEY: json.dumps(checkpoint.as_json())})
        write_json(self.pointer_file, {"file": file.name, "step": checkpoint.step})
        checkpoints = self._checkpoints()
        newest = [file for file in checkpoints if _step_of(file) <= checkpoint.step][:keep]
        for file in set(checkpoints) - set(newest):
            file.unlink(missing_ok=True)

    def load_checkpoint(self, on_note: Callable[[str], None]) -> Checkpoint | None:
        """Load the checkpoint that `last.json` names, else the newest older one that is whole; None without one."""
        for file in self._usable_checkpoints():
            try:
                contents = read_contents(file)
                return Checkpoint.from_json(contents.tensors, json.loads(contents.metadata[STATE_KEY]))
            except (UserError, KeyError, TypeError, ValueError) as error:
                on_note(f"The checkpoint {file.name} cannot be used ({error}); the one before it is tried.")
        if self.pointer_file.is_file():
            on_note("No checkpoint of this run is left; it starts again from its first step.")
        return None

    def _usable_checkpoints(self) -> list[Path]:
        """The checkpoint that the pointer names and older ones: for a newer one, a crash took what belongs to it."""
        if not self.pointer_file.is_file():
            return []
        named = _CHECKPOINT.match(str(_read_json(self.pointer_file).get("file")))
        return [file for file in self._checkpoints() if named and _step_of(file) <= int(named[1])]

    def _checkpoints(self) -> list[Path]:
        """All checkpoint files, the newest step first."""
        files = [file for file in self.path.iterdir() if _CHECKPOINT.match(file.name)]
        return sorted(files, key=_step_of, reverse=True)

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl up to the first that a crash cut short."""
        if not self.metrics_file.is_file():
            return []
        lines = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append all lines to metrics.jsonl, or none of them; raises `UserError` if they cannot be written."""
        size = self.metrics_bytes()
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(_as_jsonl(lines))
        except OSError as error:
            if self.metrics_bytes() > size:
                os.truncate(self.metrics_file, size)
            raise UserError(
                f"{self.metrics_file} could not be written ({error.strerror}); free some space or choose a folder that "
                "you can write to, and start the same run again: it resumes from its last checkpoint."
            ) from error

    def rewrite_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        write_text(self.metrics_file, _as_jsonl(lines))

    def sync_metrics(self) -> None:
        """Force the lines to the disk, so that a checkpoint never counts on lines that a crash took."""
        if self.metrics_file.is_file():
            with open(self.metrics_file, "rb+") as file:
                os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        return self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0

    def cut_metrics(self, size: int) -> None:
        """Remove the lines after byte `size`, which a resumed run writes again; the file exists afterwards."""
        self.append_metrics([])
        text = self.metrics_file.read_bytes()[:size]
        os.truncate(self.metrics_file, text.rfind(b"\n") + 1)


def _as_jsonl(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _step_of(checkpoint_file: Path) -> int:
    return int(checkpoint_file.stem.removeprefix("step_"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); choose another run name, or delete that folder.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} was not written by a run; choose another run name, or delete that folder.")
    return value


# ---- which folder a run gets -----------------------------------------------------------------------------------------


def claim_run_folder(
    path: Path, identity: Mapping[str, Any], on_existing: str, on_note: Callable[[str], None]
) -> RunFolder:
    """Return the folder that this run works in, locked until its `release`.

    `auto` resumes a run with the same identity; a folder of another run, or of other files, stays as it is, and the
    next free name is taken (`name_2`, …). `resume` and `restart` insist on the folder itself, `fail` on a free one.
    Raises `UserError` for a folder that another training is working in.
    """
    if on_existing not in ON_EXISTING:
        raise UserError(f"on_existing is {on_existing!r}; choose {' or '.join(ON_EXISTING)}.")
    if on_existing == "auto":
        return _first_fitting(path, identity, on_note)
    if on_existing == "fail" and not _is_free(path):
        raise UserError(f"{path} already holds something; choose another run name.")
    folder = _locked(path, on_note)
    if folder is None:
        raise _is_busy(path)
    try:
        if on_existing != "fail" and not _is_free(path):
            _enter(folder, identity, on_existing, on_note)
    except BaseException:
        folder.release()
        raise
    return folder


def _enter(folder: RunFolder, identity: Mapping[str, Any], on_existing: str, on_note: Callable[[str], None]) -> None:
    """Resume or delete the run in a folder, as the user chose."""
    existing = folder.identity()
    if existing is None:
        advice = "choose another run name, nothing was deleted"
        if on_existing == "resume":
            advice = "choose the folder of the run to resume"
        raise UserError(f"{folder.path} holds files that are not a run; {advice}.")
    if on_existing == "restart":
        folder.clear()
        on_note(f"The earlier run in {folder.path} was deleted, as requested.")
    elif changes := differences(existing, identity):
        raise UserError(
            f"The run in {folder.path} cannot be resumed because something has changed: {'; '.join(changes)}. Change "
            "it back, or choose another run name."
        )


def _first_fitting(path: Path, identity: Mapping[str, Any], on_note: Callable[[str], None]) -> RunFolder:
    first_reason = ""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}_{number}")
        folder = _locked(candidate, on_note)
        reasons = _reasons_against(candidate, identity, busy=folder is None)
        if folder is not None and not reasons:
            if first_reason:
                on_note(f"{path.name} is left as it is ({first_reason}); this run is in {candidate.name}.")
            return folder
        first_reason = first_reason or "; ".join(reasons)
        if folder is not None:
            folder.release()
    raise AssertionError("unreachable")


def _reasons_against(path: Path, identity: Mapping[str, Any], *, busy: bool) -> list[str]:
    """Return why a run cannot use a folder; raises `UserError` if the same run is training there now."""
    if not busy and _is_free(path):
        return []
    existing = RunFolder(path).identity()
    reasons = ["it holds other files"] if existing is None else differences(existing, identity)
    if busy and existing is None:
        return ["another training is starting there"]
    if busy and not reasons:
        raise _is_busy(path)
    return reasons


def _locked(path: Path, on_note: Callable[[str], None]) -> RunFolder | None:
    lock = lock_folder(path, on_note)
    return None if lock is None else RunFolder(path, lock)


def _is_busy(path: Path) -> UserError:
    return UserError(
        f"Another training is working in {path} right now; wait until it ends, stop it, or choose another run name."
    )


def _is_free(path: Path) -> bool:
    """Return whether a folder holds nothing but what a training leaves that was killed at its very start."""
    if not path.is_dir():
        return not path.exists()
    return all(file.name == LOCK_NAME or file.name.endswith(PART_SUFFIX) for file in path.iterdir())


def differences(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs between two identities, in words."""
    names = {"model": "the model", "train": "the training data", "validation": "the validation data"}
    words = [f"{name} changed" for key, name in names.items() if existing.get(key) != wanted.get(key)]
    before, now = existing.get("settings", {}), wanted.get("settings", {})
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            words.append(f"{name} was {before.get(name)} and is {now.get(name)}")
    return words
