"""A real ComfyUI with this pack, for tests: its process, its HTTP and WebSocket interface, its page in a browser."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
_PREVIEWS, _TEXT = (1, 4), 3  # binary WebSocket events
_ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_comfyui() -> Path | None:
    """$COMFYUI_PATH, else the ComfyUI whose custom_nodes holds this folder, else ~/ComfyUI."""
    above = PACK.parent.parent if PACK.parent.name == "custom_nodes" else None
    for place in (os.environ.get("COMFYUI_PATH"), above, Path.home() / "ComfyUI"):
        if place and (Path(place) / "main.py").is_file():
            return Path(place)
    return None


def python() -> str:
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


def what_is_missing() -> str | None:
    """Why no ComfyUI can be started here, in words; None if one can."""
    if find_comfyui() is None:
        return "no ComfyUI found (set COMFYUI_PATH)"
    check = "import aiohttp, av, comfyui_frontend_package, sqlalchemy, torchsde, kornia"
    done = subprocess.run([python(), "-c", check], capture_output=True, text=True)
    if done.returncode:
        return f"ComfyUI's requirements are not installed for {python()} ({done.stderr.strip().splitlines()[-1]})"
    return None


_PREAMBLE = """
import json, sys
arguments, sys.argv[1:] = sys.argv[2:], sys.argv[1].split()
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import torch
from safetensors.torch import load_file, save_file
"""


def in_comfyui(script: str, *arguments, flags: str = "--cpu") -> tuple[str, str]:
    """(stdout, stderr) of a script beside ComfyUI's own modules, without a server; it finds `arguments`.

    Skips where there is no ComfyUI.
    """
    if (missing := what_is_missing()) is not None:
        pytest.skip(missing)
    command = [python(), "-c", _PREAMBLE + script, flags, *map(str, arguments)]
    done = subprocess.run(command, cwd=find_comfyui(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def find_browser() -> str | None:
    for name in (os.environ.get("CHROMIUM_PATH"), "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    return None


class Server:
    """ComfyUI on the CPU in a temporary base folder, with this pack in its custom_nodes."""

    def __init__(self):
        self.base = Path(tempfile.mkdtemp(prefix="clip_finetune_comfyui_"))
        for name in (
            "custom_nodes",
            "input",
            "output",
            "temp",
            "user",
            "datasets",
            "models/full_clip",
            "models/text_encoders",
            "models/loras",
        ):
            (self.base / name).mkdir(parents=True)
        (self.base / "custom_nodes" / "clip-finetune").symlink_to(PACK, target_is_directory=True)
        shutil.copy(PACK / "tests" / "comfyui_probe.py", self.base / "custom_nodes")
        self.log = self.base / "server.log"

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            python(),
            "main.py",
            "--cpu",
            "--disable-api-nodes",
            "--disable-auto-launch",
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base.as_posix()}/user/comfyui.db",
        ]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=find_comfyui(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        for _ in range(1200):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended by itself:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return self
            time.sleep(0.25)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *exc) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def request(self, path: str, body=None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with _HTTP.open(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str):
        status, content = self.request(path)
        assert status == 200, (path, status, content[:300])
        return json.loads(content)

    def choices(self, node: str, widget: str) -> list[str]:
        """What a combo offers now."""
        inputs = self.get(f"/object_info/{node}")[node]["input"]
        found = next(group[widget] for group in inputs.values() if widget in group)
        return found[0] if isinstance(found[0], list) else found[1]["options"]

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def queue(self, prompt: dict, *, on_message: Callable[[dict], None] = lambda message: None, timeout=600) -> dict:
        """Queue an API-format prompt and wait for its end; the dict has status, error, node_errors, executed, cached,
        previews (JPEG bytes), texts (by node) and outputs (by node)."""
        waiting = asyncio.wait_for(self._queue(prompt, on_message), timeout)
        with concurrent.futures.ThreadPoolExecutor(1) as other_thread:  # Playwright has an event loop in this one
            return other_thread.submit(asyncio.run, waiting).result()

    def forget(self) -> None:
        """As after a restart: nothing that ran is remembered. The host does that after a prompt, so one is queued."""
        self.request("/free", {"unload_models": True, "free_memory": True})
        inputs = {
            "1": {"class_type": "PrimitiveInt", "inputs": {"value": 1}},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        }
        result = self.queue(inputs)
        assert result["status"] == "success", result

    async def _queue(self, prompt: dict, on_message) -> dict:
        import aiohttp

        client = uuid.uuid4().hex
        seen: dict = {
            "status": "rejected",
            "error": None,
            "node_errors": {},
            "executed": [],
            "cached": [],
            "previews": [],
            "texts": {},
            "outputs": {},
        }
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as connection:
            await connection.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as reply:
                answer = await reply.json()
            seen["node_errors"] = answer.get("node_errors", {})
            if reply.status != 200:
                return seen | {"error": answer.get("error")}
            async for message in connection:
                if message.type == aiohttp.WSMsgType.BINARY:
                    _record_binary(message.data, seen)
                    on_message({"type": "binary", **seen})
                    continue
                found = json.loads(message.data)
                data = found.get("data", {})
                if found["type"] == "executing" and data.get("node"):
                    seen["executed"].append(data["node"])
                elif found["type"] == "execution_cached":
                    seen["cached"] += data["nodes"]
                elif found["type"] == "executed":
                    seen["outputs"][data["node"]] = data["output"]
                elif found["type"] in _ENDS and data.get("prompt_id") == answer["prompt_id"]:
                    error = data.get("exception_message") if found["type"] == "execution_error" else None
                    return seen | {"status": _ENDS[found["type"]], "error": error}
                on_message(found)
        raise RuntimeError("ComfyUI closed the connection")

    # ---- the page --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def page(self, size=(1700, 1000)):
        """The real page in a browser (a Playwright page), ready to load graphs."""
        from playwright.sync_api import sync_playwright

        self.request("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False})
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=flags)
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.set_default_timeout(120_000)
            page.goto(self.url, wait_until="domcontentloaded")
            page.wait_for_function("""() => window.app?.extensionManager
                && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100""")
            page.wait_for_timeout(1500)
            try:
                yield page
            finally:
                browser.close()


def _record_binary(data: bytes, seen: dict) -> None:
    event, payload = struct.unpack(">I", data[:4])[0], data[4:]
    size = struct.unpack(">I", payload[:4])[0]
    if event == _TEXT:
        seen["texts"][payload[4 : 4 + size].decode()] = payload[4 + size :].decode()
    elif event in _PREVIEWS:
        seen["previews"].append(payload[4:] if event == _PREVIEWS[0] else payload[4 + size :])
