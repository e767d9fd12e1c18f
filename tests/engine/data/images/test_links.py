"""Folders that contain links to themselves are walked once, whatever walks them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_folders import labels_folder

import clip_finetune
from clip_finetune.engine.data.images.folder_tree import walk

PACKAGE = Path(clip_finetune.__file__).parent
SECONDS = 60  # a walk takes milliseconds, starting Python the rest
LINKS = 4  # without a limit, each level has four times as many folders as the one above

pytestmark = pytest.mark.skipif(os.name == "nt", reason="making a link needs a right there")

# ComfyUI's modules, as far as nodes/host/folders.py imports them.
HOST = """
import json, sys, types

def stub(name, **members):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(members)

root, package = sys.argv[1:3]
for name in ("comfy", "comfy.model_management", "comfy.sd", "comfy.utils"):
    stub(name)
stub("server", PromptServer=None)
stub("folder_paths", get_folder_paths=lambda kind: [root + "/datasets"], get_input_directory=lambda: root + "/input",
     get_output_directory=lambda: root + "/output")
stub("clip_finetune.nodes", __path__=[package + "/nodes"])
from clip_finetune.nodes.host import folders as host
"""


def run(script: str, *arguments) -> str:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def link_to_itself(folder: Path, top: Path) -> None:
    for number in range(LINKS):
        (folder / f"link{number}").symlink_to(top, target_is_directory=True)


@pytest.fixture
def folder(tmp_path):
    """`mine/sub` holds captioned images, and links to `mine` and to itself."""
    labels_folder(tmp_path / "mine/sub", 4)
    link_to_itself(tmp_path / "mine/sub", tmp_path / "mine")
    (tmp_path / "mine/sub/itself").symlink_to(tmp_path / "mine/sub", target_is_directory=True)
    return tmp_path / "mine"


def test_a_walk_lists_each_real_folder_once(folder):
    (folder / "deeper").mkdir()
    (folder / "deeper/way back").symlink_to(folder.parent, target_is_directory=True)
    walked = [os.path.realpath(where) for where, _, _ in walk(folder)]
    assert sorted(walked) == sorted(map(str, (folder.parent, folder, folder / "sub", folder / "deeper")))


def test_a_walk_goes_the_way_of_os_walk(tmp_path):
    for name in ("b/c/d", "a/e", "f"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/file.txt").write_text("")
    (tmp_path / "b/nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "b/loop").symlink_to(tmp_path / "b/loop")
    assert list(walk(tmp_path)) == list(os.walk(tmp_path, followlinks=True))
    failed = []
    assert list(walk(tmp_path / "none", failed.append)) == []
    assert failed[0].filename == str(tmp_path / "none")


def test_a_data_set_is_read_in_time(folder):
    script = "import sys; from clip_finetune.engine import load_dataset; print(len(load_dataset(sys.argv[1])))"
    assert run(script, folder).split() == ["4"]


def test_the_fingerprint_of_a_folder_is_taken_in_time(folder):
    script = HOST + "print(json.dumps(host.folder_fingerprint(sys.argv[3])))"
    found = json.loads(run(script, folder, PACKAGE, folder))
    names = [f"{number:03}.png" for number in range(4)] + ["labels.json"]
    assert [path for path, *_ in found] == [str(folder / "sub" / name) for name in names]


def test_the_list_of_data_sets_names_what_is_in_a_folder_once(tmp_path):
    for name in ("datasets/a/sub", "input", "output"):
        (tmp_path / name).mkdir(parents=True)
    link_to_itself(tmp_path / "datasets", tmp_path / "datasets")
    link_to_itself(tmp_path / "datasets/a/sub", tmp_path / "datasets")
    found = json.loads(run(HOST + "print(json.dumps(host.list_datasets()))", tmp_path, PACKAGE))
    assert found == ["a", "a/sub", "link0", "link1", "link2", "link3"]
