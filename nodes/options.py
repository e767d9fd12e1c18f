"""The option nodes: one for each section of the training settings, chained into the training node's `options` input."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..engine.settings import setting_infos
from ..engine.train.config import SECTIONS
from .schema import node_schema, setting_input
from .sockets import TrainOptions, TrainOptionsSocket

ON_TRAINING_NODE = ("loss",)  # settings of a section whose widget is on the training node itself


def _option_node(section: str, settings: type) -> type[io.ComfyNode]:
    """Return the node for a section: a widget for each of its settings, and a link from the previous option node."""
    infos = [info for name, info in setting_infos(settings).items() if name not in ON_TRAINING_NODE]
    summary = (settings.__doc__ or "").partition("\n")[0]

    class OptionNode(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return node_schema(
                f"CLIPTrain{section.capitalize()}",
                f"Train CLIP: {section.capitalize()}",
                "train/options",
                f"Options for Train CLIP. {summary} Connect it to the training node's options input; "
                "without it the values shown here are used.",
                aliases=", ".join(["training settings", *(info.name.replace("_", " ") for info in infos)]),
                inputs=[
                    TrainOptionsSocket.Input("options", optional=True, tooltip="The options of another option node."),
                    *map(setting_input, infos),
                ],
                outputs=dict(options=TrainOptionsSocket),
            )

        @classmethod
        def execute(cls, options: TrainOptions | None = None, **values: Any) -> io.NodeOutput:
            return io.NodeOutput((options or TrainOptions()).with_section(section, values))

    OptionNode.__name__ = OptionNode.__qualname__ = f"CLIPTrain{section.capitalize()}"
    return OptionNode


NODES = [_option_node(section, settings) for section, settings in SECTIONS.items()]
