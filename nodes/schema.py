"""How the pack's nodes are described to ComfyUI: their schema, their widgets, and inputs that several of them have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from ..engine.data.readers.registry import FORMAT_NAMES
from ..engine.settings import SettingInfo
from .host.folders import list_datasets
from .sockets import FullClip


def node_schema(
    node_id: str,
    display_name: str,
    category: str,
    description: str,
    *,
    aliases: str,
    inputs: list[io.Input],
    outputs: Mapping[str, Any],
    is_output_node: bool = False,
    is_input_list: bool = False,
) -> io.Schema:
    """Return a schema in the pack's category. `outputs` has the socket type of each output by its name.

    `aliases` are other words that find the node in the search box, separated by commas.
    """
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=f"CLIP fine-tuning/{category}",
        description=description,
        search_aliases=[*aliases.split(", "), "fine-tune", "finetune"],
        inputs=inputs,
        outputs=[socket.Output(display_name=name) for name, socket in outputs.items()],
        hidden=[io.Hidden.unique_id],
        is_output_node=is_output_node,
        is_input_list=is_input_list,
    )


def widget(
    name: str,
    default: Any,
    tooltip: str,
    *,
    choices: Iterable[str] = (),
    min: float | None = None,
    max: float | None = None,
    step: float | None = None,
    multiline: bool = False,
    advanced: bool = False,
) -> io.Input:
    """Return the widget for a value of `default`'s type. It is optional: an API prompt may leave it out."""
    common: dict[str, Any] = dict(default=default, optional=True, tooltip=tooltip, advanced=advanced or None)
    if choices:
        return io.Combo.Input(name, options=list(choices), **common)
    if isinstance(default, bool):
        return io.Boolean.Input(name, **common)
    if isinstance(default, str):
        return io.String.Input(name, multiline=multiline, **common)
    limits = {key: value for key, value in (("min", min), ("max", max), ("step", step)) if value is not None}
    if isinstance(default, float):
        return io.Float.Input(name, **limits, **common)
    # The page would otherwise change a seed, and so train anew, each time it is queued.
    fixed = {"control_after_generate": False} if name == "seed" else {}
    return io.Int.Input(name, **limits, **fixed, **common)


def setting_input(info: SettingInfo) -> io.Input:
    """Return the widget for a setting of the engine."""
    return widget(info.name, info.default, info.help, choices=info.choices, min=info.min, max=info.max, step=info.step)


def seed_input(tooltip: str) -> io.Input:
    return widget("seed", 0, tooltip, min=0, max=2**53)


def folder_input() -> io.Input:
    tooltip = "A folder of captioned images in ComfyUI's datasets or input folder. Press R after adding one."
    return io.Combo.Input("folder", options=list_datasets(), tooltip=tooltip)


def captions_input(*, advanced: bool) -> io.Input:
    tooltip = "The format of the captions; auto recognises it."
    return widget("captions", "auto", tooltip, choices=FORMAT_NAMES, advanced=advanced)


def filename_prefix_input(default: str) -> io.Input:
    tooltip = "Folder and beginning of the file name in ComfyUI's output folder; a number is added."
    return widget("filename_prefix", default, tooltip)


def baseline_input(*, optional: bool = False) -> io.Input:
    return FullClip.Input("baseline", optional=optional, tooltip="The model to compare with: the one you trained from.")
