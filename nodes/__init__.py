"""What a graph sees: schemas, one call of the engine each, and presentation."""

from comfy_api.latest import ComfyExtension

from . import attacks, comparison, dataset, evaluation, exports, host, images, models, training

NODES = [
    *models.NODES,
    *exports.NODES,
    *dataset.NODES,
    *images.NODES,
    *training.NODES,
    *evaluation.NODES,
    *attacks.NODES,
    *comparison.NODES,
]


class ClipFinetuneExtension(ComfyExtension):
    async def get_node_list(self):
        host.register_folders()
        return NODES
