"""The nodes: each is a schema, one call of the engine, and what to show. Only `host` talks to ComfyUI itself."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attacks, comparison, dataset, evaluation, exports, images, models, options, training
from .host.folders import register_folders

_MODULES = (models, exports, dataset, images, training, options, evaluation, attacks, comparison)


class ClipFinetuneExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        return [node for module in _MODULES for node in module.NODES]
