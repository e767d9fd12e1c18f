"""Fixtures shared by all tests."""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from comfyui_server import Server, find_browser, what_is_missing

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(config, items):
    """Tests marked soak run only when they are asked for; those that use the fixture `soak` are longer then."""
    asked = "soak" in config.option.markexpr
    skip = pytest.mark.skip(reason="long; run with -m soak")
    for item in items:
        if "soak" in item.keywords and not asked:
            item.add_marker(skip)
        if "soak" in getattr(item, "fixturenames", ()) and asked:
            item.add_marker(pytest.mark.soak)


@pytest.fixture
def soak(pytestconfig) -> bool:
    """Whether the long form of a test is asked for (-m soak)."""
    return "soak" in pytestconfig.option.markexpr


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real captioned pictures kept beside the project; tests that want them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real pictures beside the project (shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def comfyui():
    """A running ComfyUI with this pack, shared by all tests; each uses its own names."""
    if (missing := what_is_missing()) is not None:
        pytest.skip(missing)
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def small_outputs(request):
    """What a test of the shared server wrote is gone after it, if it is large: models would fill the disk."""
    yield
    if "comfyui" in request.fixturenames:
        for file in (request.getfixturevalue("comfyui").base / "output").rglob("*"):
            if file.is_file() and file.stat().st_size > 20e6:
                file.unlink()


@pytest.fixture(scope="session")
def browser_page(comfyui):
    if find_browser() is None:
        pytest.skip("no Chromium found (set CHROMIUM_PATH)")
    with comfyui.page() as page:
        yield page


@pytest.fixture
def screenshot(request, browser_page):
    """Call it to keep a picture of the page under the test's name in $SCREENSHOTS, if that is set."""

    def take(name: str = "") -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            file = Path(folder) / f"{request.node.name}{name and '-' + name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            browser_page.screenshot(path=file)

    return take


@pytest.fixture
def ordinary_user():
    """(a folder that anyone may enter, a context in which this process may read only what an ordinary user may).

    Whatever is imported for the first time in it may not be found: do before it once what is done in it.
    """
    if not hasattr(os, "seteuid"):
        pytest.skip("permissions are POSIX's here")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder), _as_nobody if os.geteuid() == 0 else contextlib.nullcontext


@contextlib.contextmanager
def _as_nobody():
    """Root may read everything, and so may its processes, until they take another user's rights."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path):
    """Call it with a size in megabytes to mount a disk of that size (a tmpfs), or to resize it; gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(megabytes, mode="rw"):
        options = f"{'remount,' if mounted else ''}size={megabytes}m,{mode}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here ({done.stderr.decode().strip()})")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
