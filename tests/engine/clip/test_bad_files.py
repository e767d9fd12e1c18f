"""Bad files of every kind: each is refused in one sentence, and nothing in it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bad_files import BAD_FILES, RAN, REFUSED, REPORTED, whole

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads memory from /proc")

OPENER = Path(__file__).resolve().parents[2] / "open_files.py"
LONGEST_SENTENCE = 700
LONGEST = 10  # seconds of the processor's time
MOST_GROWTH = 600 << 20  # the longest pickle that is read at all, and what Python makes of it
WAYS_OUT = re.compile(
    r"\b(use|download|save|choose|give|open|get|merge|fold|take|unpack|run|load|apply|train|set|must|correct)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return what became of every bad file, by its id, and the files in the folder before and after."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "base.pt").write_bytes(whole("ours"))
    jobs = []
    for file in BAD_FILES:
        opened = file.write(folder) or file.name
        jobs.append({"id": file.id, "file": opened, "merge": file.merge is not None})
    before = listing(folder)
    found = {}
    while len(found) < len(jobs):
        left = [job for job in jobs if job["id"] not in found]
        found |= open_all(folder, left)
    return {job["id"]: found[job["id"]] | {"file": job["file"]} for job in jobs}, before, listing(folder)


def open_all(folder, jobs):
    """Return what became of the files up to one that ended the process, if any did."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(OPENER)],
        input=json.dumps({"files": jobs, "base": "base.pt", "facts": str(folder.with_name("facts.json"))}),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    found = {line["id"]: line for line in lines if "id" in line}
    if done.returncode:
        begun = lines[-1].get("begun")
        assert begun, done.stderr
        found[begun] = {"died": f"status {done.returncode}: {done.stderr[-1500:]}"}
    return found


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def wrong_with(file, found):
    """Yield what became of a bad file and should not have."""
    if "died" in found:
        yield f"ended the process: {found['died']}"
        return
    if found["grown"] > MOST_GROWTH:
        yield f"took {found['grown'] >> 20} MB"
    for way, expected in (("load", file.load), ("info", file.info), ("merge", file.merge)):
        if way not in found:
            continue
        done = found[way]
        if done["crash"]:
            yield f"{way}: {done['crash']}"
        if done["seconds"] > LONGEST:
            yield f"{way}: took {done['seconds']:.0f} s"
        if done["refused"] is not None:
            yield from (
                f"{way}: {fault}: {done['refused'][:2000]!r}" for fault in faults(done["refused"], found["file"])
            )
        elif expected == REFUSED and not done["crash"]:
            yield f"{way}: it was opened: {done['result']}"
        elif expected == REPORTED and not done["crash"]:
            if done["result"]["kind"] == "full_clip" and not done["result"]["problems"]:
                yield f"{way}: passes for a sound model"


def faults(sentence, file):
    """Yield what is wrong with a sentence that refuses a file."""
    if len(sentence.splitlines()) != 1:
        yield "not one line"
    if len(sentence) > LONGEST_SENTENCE + len(file):
        yield "too long"
    if not sentence.isprintable() and file.isprintable():
        yield "not printable"
    beside = f"{file.rpartition('/')[0] or file}/"  # what is wrong may be a shard, or a config
    if file not in sentence and beside not in sentence:
        yield "does not name the file as it was given"
    if not WAYS_OUT.search(sentence.replace(file, "")):
        yield "says no way out"
    if not sentence.endswith("."):
        yield "is no sentence"


def test_the_corpus_is_large_and_has_no_file_twice():
    assert len(BAD_FILES) >= 120
    assert len({file.id for file in BAD_FILES}) == len({file.name for file in BAD_FILES}) == len(BAD_FILES)


def test_every_bad_file_is_refused_in_one_sentence_that_names_it_and_says_what_to_do(outcomes):
    found, _, _ = outcomes
    wrong = [f"{file.id}: {fault}" for file in BAD_FILES for fault in wrong_with(file, found[file.id])]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)


def test_nothing_in_a_bad_file_runs_and_no_file_is_left_behind(outcomes):
    _, before, after = outcomes
    assert before == after and not any(Path(name).name == RAN for name in after)


@pytest.mark.parametrize("kind", ["openai", "ours", "hugging_face", "zip", "legacy", "module", "script"])
def test_the_whole_files_that_bad_ones_are_made_from_open(kind, tmp_path):
    from clip_finetune.engine import load_full_clip

    (tmp_path / "whole.pt").write_bytes(whole(kind))
    assert load_full_clip(tmp_path / "whole.pt").architecture.text_width == 16
