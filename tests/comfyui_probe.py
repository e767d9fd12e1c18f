"""Nodes for the tests, put into the custom_nodes of their ComfyUI."""

import os

import folder_paths
import torch
from safetensors.torch import save_file

import nodes


class ProbeConditioning:
    """Writes a CONDITIONING to a file."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "write"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "file": ("STRING", {"default": "probe"})}}

    def write(self, conditioning, file):
        hidden, more = conditioning[0]
        tensors = {"hidden": hidden.clone().contiguous()}
        if isinstance(more.get("pooled_output"), torch.Tensor):
            tensors["pooled"] = more["pooled_output"].clone().contiguous()
        save_file(tensors, os.path.join(folder_paths.get_output_directory(), file + ".safetensors"))
        return {}


class ProbeLora:
    """What LoraLoader does to a CLIP; that node wants a MODEL too."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "lora_name": ("STRING", {}), "strength": ("FLOAT", {"default": 1.0})}}

    def apply(self, clip, lora_name, strength):
        return (nodes.LoraLoader().load_lora(None, clip, lora_name, 0.0, strength)[1],)


NODE_CLASS_MAPPINGS = {"ProbeConditioning": ProbeConditioning, "ProbeLora": ProbeLora}
