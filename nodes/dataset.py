"""Nodes that open data sets."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.data.captions import FORMATS
from ..engine.data.dataset import load_dataset, split_dataset
from . import host
from .sockets import CATEGORY, Dataset


class LoadCLIPDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadCLIPDataset",
            display_name="Load CLIP Dataset",
            category=CATEGORY,
            description="Opens a folder of captioned pictures: text files beside the pictures, a labels JSON, a CSV "
            "with the columns image and caption, or a subfolder for each class. The folder lies in ComfyUI's datasets "
            "or input folder.",
            search_aliases=["captions", "training images"],
            inputs=[
                io.Combo.Input("folder", options=host.list_datasets(), tooltip="Press R after adding a folder."),
                io.Combo.Input("captions", options=list(FORMATS), default="auto", optional=True,
                               tooltip="Where the captions are: auto recognises it."),
                io.Float.Input(
                    "validation_split", default=0.1, min=0.0, max=0.9, step=0.01, optional=True,
                    tooltip="The share of the pictures that is kept from training, to measure on.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False, optional=True,
                             tooltip="Which pictures are kept for validation."),
            ],
            outputs=[Dataset.Output(display_name="train"), Dataset.Output(display_name="validation")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, captions="auto", validation_split=0.1, seed=0):
        return host.folder_fingerprint(host.find_dataset(folder)) if folder in host.list_datasets() else (folder,)

    @classmethod
    def execute(cls, folder, captions="auto", validation_split=0.1, seed=0):
        opened = load_dataset(host.find_dataset(folder), captions)
        train, validation = split_dataset(opened, validation_split, seed)
        display = host.Display(cls.hidden.unique_id)
        display.say(f"{len(train)} pictures to train on, {len(validation)} to validate on: {opened.reason}.")
        for note in opened.notes:
            display.say(note)
        return io.NodeOutput(train, validation)


NODES = [LoadCLIPDataset]
