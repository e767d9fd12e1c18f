"""Arrows point down only: nodes, cli → train → evaluate → clip, data; report takes numbers; the engine never sees the
host, and importing it costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each layer of the engine may import, besides itself, errors and openai.
BELOW = {
    "clip": set(),
    "data": set(),
    "report": set(),
    "evaluate": {"clip", "data", "report"},
    "train": {"clip", "data", "evaluate", "report"},
}
HOST = {"comfy", "comfy_api", "folder_paths", "server", "nodes", "execution"}
FILES = [path for top in ("engine", "nodes") for path in sorted((ROOT / top).rglob("*.py"))]


def imports(path):
    """(modules named absolutely, modules of this project as paths from its root)."""
    package = path.relative_to(ROOT).parent.parts
    absolute, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            named = base + tuple((node.module or "").split(".") if node.module else ())
            own |= {named} if node.module else {base + (alias.name,) for alias in node.names}
    return absolute, own


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down_and_stay_relative(path):
    absolute, own = imports(path)
    assert "clip_finetune" not in absolute, "ComfyUI may have renamed the folder"
    here = path.relative_to(ROOT).parts
    if here[0] == "engine":
        assert not absolute & HOST and not any(named[0] == "nodes" for named in own)
    elif here[-1] not in ("host.py", "__init__.py"):
        assert not absolute & (HOST - {"comfy_api"}), "only host.py talks to ComfyUI"
    if here[0] == "engine" and len(here) == 3:
        layers = {named[1] for named in own if len(named) > 1 and named[0] == "engine"}
        assert layers <= BELOW[here[1]] | {here[1], "errors", "openai"}


def test_the_command_answers_without_importing_what_it_does_not_need():
    code = "import sys, clip_finetune.engine.cli as c; print([m for m in ('open_clip', 'matplotlib', 'torchvision', "
    code += "'adabelief_pytorch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pack_imports_without_comfyui():
    code = "import sys, clip_finetune; print(clip_finetune.WEB_DIRECTORY, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "./web False"
