"""Opens model files in every way that the project does, and tells what came of it; run by test_bad_files.py.

From standard input: JSON {"files": [{"id", "file", "merge"}], "base": a full CLIP, "facts": a file to write to}. To
standard output: a line of JSON for each file that is begun, and one for what became of it. The current folder is where
the files are.
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
    """A size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def outcome(call: Callable[[], object]) -> dict:
    """What a call gave or raised, how long it took, and whether it asked for memory that no small file needs."""
    started, crash, refused, result = time.process_time(), None, None, None
    try:
        result = call()
    except UserError as error:
        refused = str(error)
        if any(_no_memory(cause) for cause in _causes(error)):
            crash = f"asked for more than {MOST_MEMORY} bytes"
    except BaseException as error:  # all of them are what the test looks for
        crash = f"{type(error).__name__}: {error}"[:500]
    return {"refused": refused, "crash": crash, "result": result, "seconds": time.process_time() - started}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def info(path: str, facts: Path) -> dict:
    """What the command `info` in this process writes to a file; raises the error that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        failed = main(["info", path, "--json", str(facts)])
    if failed:
        assert said.getvalue().startswith(ERROR) and said.getvalue().endswith("\n"), said.getvalue()
        raise UserError(said.getvalue()[len(ERROR) : -1])
    assert not said.getvalue(), said.getvalue()
    found = json.loads(facts.read_text(encoding="utf-8"))
    return {"kind": found["kind"], "problems": found.get("problems", [])}


def opened(path: str, merge: bool, base, facts: Path) -> dict:
    before = status("VmHWM")
    done = {
        "load": outcome(lambda: load_full_clip(path).architecture.as_dict()),
        "info": outcome(lambda: info(path, facts)),
    }
    if merge:
        done["merge"] = outcome(lambda: list(merge_text_encoder(path, base).notes))
    return done | {"grown": status("VmHWM") - before}


def tell(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    base = load_full_clip(jobs["base"])
    facts = Path(jobs["facts"])
    opened(jobs["base"], True, base, facts)  # all that is imported late is there now
    most = status("VmSize") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for job in jobs["files"]:
        tell({"begun": job["id"]})
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        tell({"id": job["id"]} | opened(job["file"], job["merge"], base, facts))
        faulthandler.cancel_dump_traceback_later()
