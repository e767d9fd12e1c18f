"""Open model files in every way that the project does, and report the outcome; run by test_bad_files.py.

From standard input: JSON {"files": [{"id", "file", "merge"}], "base": a full CLIP, "facts": a file to write to}. To
standard output: a line of JSON for each file when it begins, and one with its outcome. The current folder holds the
files.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_finetune.engine import UserError, load_full_clip, merge_text_encoder
from clip_finetune.engine.cli import main

MOST_MEMORY = 2 << 30
ERROR = "clip-finetune info: "
LONGEST = 60  # seconds, after which the process ends itself


def status(field: str) -> int:
    """Return a memory size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def outcome(call: Callable[[], object]) -> dict:
    """Return what a call returned or raised, how long it took, and whether it asked for more memory than allowed."""
    started, crash, refused, result = time.process_time(), None, None, None
    try:
        result = call()
    except UserError as error:
        refused = str(error)
        if any(_no_memory(cause) for cause in _causes(error)):
            crash = f"asked for more than {MOST_MEMORY} bytes"
    except BaseException as error:  # the test looks for any of them
        crash = f"{type(error).__name__}: {error}"[:500]
    return {"refused": refused, "crash": crash, "result": result, "seconds": time.process_time() - started}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def info(path: str, facts: Path) -> dict:
    """Return what the command `info` writes to a file; raise the error that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        failed = main(["info", path, "--json", str(facts)])
    if failed:
        assert printed.getvalue().startswith(ERROR) and printed.getvalue().endswith("\n"), printed.getvalue()
        raise UserError(printed.getvalue()[len(ERROR) : -1])
    assert not printed.getvalue(), printed.getvalue()
    described = json.loads(facts.read_text(encoding="utf-8"))
    return {"kind": described["kind"], "problems": described.get("problems", [])}


def opened(path: str, merge: bool, base, facts: Path) -> dict:
    before = status("VmHWM")
    outcomes = {
        "load": outcome(lambda: load_full_clip(path).architecture.as_dict()),
        "info": outcome(lambda: info(path, facts)),
    }
    if merge:
        outcomes["merge"] = outcome(lambda: list(merge_text_encoder(path, base).notes))
    return outcomes | {"grown": status("VmHWM") - before}


def report(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    base = load_full_clip(jobs["base"])
    facts = Path(jobs["facts"])
    opened(jobs["base"], True, base, facts)  # imports what is imported late
    most = status("VmSize") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for job in jobs["files"]:
        report({"begun": job["id"]})
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        report({"id": job["id"]} | opened(job["file"], job["merge"], base, facts))
        faulthandler.cancel_dump_traceback_later()
