"""Imports point down only (nodes, cli, bench → train → evaluate → clip, data; report takes values), without circles.

The engine never imports ComfyUI, and importing it is cheap.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANYWHERE = {"errors", "files", "notes", "openai", "settings"}  # modules at the top of the engine
# What each package of the engine may import besides itself and ANYWHERE.
BELOW = {
    "clip": set(),
    "data": set(),
    "report": set(),
    "evaluate": {"clip", "data", "report"},
    "train": {"clip", "data", "evaluate", "report"},
    "bench": {"clip", "data", "evaluate", "report", "train"},
    "cli": {"clip", "data", "evaluate", "report", "train", "bench"},
}
# Circles that are still there; the list only shrinks.
KNOWN_CIRCLES: list[list[str]] = []
HOST = {"comfy", "comfy_api", "folder_paths", "server", "nodes", "execution"}
FILES = [path for top in ("engine", "nodes") for path in sorted((ROOT / top).rglob("*.py"))]
MODULES = {path.relative_to(ROOT).with_suffix("").parts for path in FILES}


def imports(path):
    """(top names of absolute imports, modules of this project as tuples of names), wherever in the file they are."""
    package = path.relative_to(ROOT).parent.parts
    absolute, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            own |= {module(base, alias.name) for alias in node.names}
    return absolute, own


def module(base, name):
    """The module that `from base import name` reads."""
    for candidate in ((*base, name), (*base, name, "__init__"), base, (*base, "__init__")):
        if candidate in MODULES:
            return candidate
    raise AssertionError(f"{'.'.join(base)} has no {name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down_and_stay_relative(path):
    absolute, own = imports(path)
    assert "clip_finetune" not in absolute, "ComfyUI may have renamed the folder"
    here = path.relative_to(ROOT).parts
    if here[0] == "nodes":
        inside_host = here[1] == "host" or here[-1] == "__init__.py"
        assert inside_host or not absolute & (HOST - {"comfy_api"}), "only nodes/host talks to ComfyUI"
        return
    assert not absolute & HOST and not any(named[0] == "nodes" for named in own)
    layer = here[1].removesuffix(".py")
    used = {named[1] for named in own} - {layer}
    if layer in BELOW:
        assert used <= BELOW[layer] | ANYWHERE
    elif layer in ANYWHERE:
        assert used <= ANYWHERE


def circles(graph):
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = {stack.pop()}
            while node not in component:
                component.add(stack.pop())
            found.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return [component for component in found if len(component) > 1]


def test_no_circle_of_imports_at_any_depth():
    graph = {}
    for path in FILES:
        here = path.relative_to(ROOT).with_suffix("").parts
        graph[here] = {named for named in imports(path)[1] if named != here and named[-1] != "__init__"}
    found = sorted(sorted(".".join(name) for name in component) for component in circles(graph))
    assert found == KNOWN_CIRCLES


def test_a_folder_has_at_most_fourteen_modules():
    folders = {}
    for path in FILES:
        if path.name != "__init__.py":
            folders.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    assert {folder: len(names) for folder, names in folders.items() if len(names) > 14} == {}


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(("clip_finetune", *path.relative_to(ROOT).parent.parts)) for path in FILES}
    assert set(listed) == found | {"clip_finetune"}


def test_the_command_answers_without_importing_what_it_does_not_need():
    slow = ("open_clip", "matplotlib", "torchvision", "adabelief_pytorch", "transformers")
    code = f"import sys, clip_finetune.engine.cli; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pack_imports_without_comfyui():
    code = "import sys, clip_finetune; print(clip_finetune.WEB_DIRECTORY, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "./web False"
