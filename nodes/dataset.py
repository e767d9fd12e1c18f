"""Nodes that load datasets, build and combine them, and convert their captions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from comfy_api.latest import io

from ..engine.data.dataset import ClipDataset
from ..engine.data.from_images import dataset_from_images
from ..engine.data.load import combine_datasets, load_dataset
from ..engine.data.readers.coco import coco_file_beside
from ..engine.data.readers.registry import WRITERS
from ..engine.data.splits import split_dataset
from ..engine.data.tools.convert import convert_captions
from ..engine.errors import UserError
from .host import folders
from .host.device import check_cancelled
from .host.display import Display, to_array
from .schema import captions_input, folder_input, node_schema, seed_input, widget
from .sockets import Dataset

_MAX_DATASETS = 32


def _column_inputs() -> list[io.Input]:
    image = "For a table: the column with the image file names. Empty: recognised by itself."
    caption = "For a table: the columns with captions, separated by commas. Empty: recognised by itself."
    return [widget("image_column", "", image, advanced=True), widget("caption_column", "", caption, advanced=True)]


def dataset_fingerprint(folder: str) -> Sequence[Any]:
    """Return what ComfyUI compares to decide whether a dataset must be read again; cheap for a folder not listed."""
    if folder not in folders.list_datasets():
        return (folder,)
    path = folders.find_dataset(folder)
    return [*folders.folder_fingerprint(path), folders.file_fingerprint(coco_file_beside(path))]


class LoadCLIPDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LoadCLIPDataset",
            "Load CLIP Dataset",
            "dataset",
            "Loads a folder of captioned images: text files beside the images, a labels JSON, a CSV with "
            "the columns image and caption, the formats of kohya, COCO and Hugging Face, or a subfolder for each "
            "class. Folders are listed from ComfyUI's datasets and input folders, and from output where captions lie "
            "beside images.",
            aliases="captions, training images, load images, kohya, coco",
            inputs=[
                folder_input(),
                captions_input(advanced=False),
                widget(
                    "validation_split",
                    0.1,
                    "Share of the images that is not trained on, but used to measure the training.",
                    min=0.0,
                    max=0.9,
                    step=0.01,
                ),
                seed_input("Decides which images are used for validation."),
                *_column_inputs(),
            ],
            outputs=dict(train=Dataset, validation=Dataset),
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **widgets: Any) -> Sequence[Any]:
        return dataset_fingerprint(folder)

    @classmethod
    def execute(
        cls, folder: str, captions: str = "auto", validation_split: float = 0.1, seed: int = 0, **columns: str
    ) -> io.NodeOutput:
        dataset = load_dataset(folders.find_dataset(folder), captions, **columns)
        train, validation = split_dataset(dataset, validation_split, seed)
        display = Display(cls)
        display.note(f"{len(train)} images for training, {len(validation)} for validation: {dataset.reason}.")
        display.notes(dataset.notes)
        return io.NodeOutput(train, validation)


class CLIPDatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "CLIPDatasetFromImages",
            "CLIP Dataset from Images",
            "dataset",
            "Makes a dataset from the images and captions of other nodes, such as a captioner. The images "
            "are stored in ComfyUI's temp folder.",
            aliases="captioner, image list to dataset, florence, training images",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A list of images, or a batch."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip="One text per image, or per batch; each line of it is a caption.",
                ),
            ],
            outputs=dict(dataset=Dataset),
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], captions: list[str]) -> io.NodeOutput:
        display = Display(cls)
        dataset = dataset_from_images(_arrays(images, display), _texts(images, captions), folders.graph_images_folder())
        display.note(f"{len(dataset)} images with captions.")
        display.notes(dataset.notes)
        return io.NodeOutput(dataset)


def _arrays(batches: Sequence[torch.Tensor], display: Display) -> Iterator[numpy.ndarray]:
    """Yield the images of all batches as uint8, one at a time so that they are not all copied at once."""
    for done, batch in enumerate(batches, 1):
        for image in batch:
            check_cancelled()
            yield to_array(image)
        display.progress(done, len(batches))


def _texts(batches: Sequence[torch.Tensor], captions: Sequence[str]) -> list[str]:
    """Return a text for each image. Where there is one text per batch, the images of a batch share it."""
    if len(captions) != len(batches):
        return list(captions)
    return [caption for batch, caption in zip(batches, captions, strict=True) for _ in batch]


class CombineCLIPDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [f"dataset_{number}" for number in range(1, _MAX_DATASETS + 1)]
        return node_schema(
            "CombineCLIPDatasets",
            "Combine CLIP Datasets",
            "dataset",
            "Combines several datasets into one, to train on all of them together.",
            aliases="merge datasets, join, concatenate, mix, weights",
            inputs=[
                io.Autogrow.Input(
                    "datasets",
                    template=io.Autogrow.TemplateNames(Dataset.Input("dataset"), names=names, min=1),
                    tooltip="Connect one, and another input appears.",
                ),
                widget(
                    "weights",
                    "",
                    "How often the images of each dataset are used in an epoch, such as 2, 1. Empty: all once.",
                ),
            ],
            outputs=dict(dataset=Dataset),
        )

    @classmethod
    def execute(cls, datasets: Mapping[str, ClipDataset], weights: str = "") -> io.NodeOutput:
        names = sorted(datasets, key=lambda name: int(name.rpartition("_")[2]))
        combined = combine_datasets([datasets[name] for name in names], _parse_weights(weights))
        per_epoch = sum(combined.repeats) if combined.repeats else len(combined)
        Display(cls).note(f"{len(combined)} images; {per_epoch} per epoch.")
        return io.NodeOutput(combined)


def _parse_weights(weights: str) -> list[float] | None:
    try:
        return [float(word) for word in re.split(r"[\s,;]+", weights.strip()) if word] or None
    except ValueError as error:
        raise UserError(f"weights is {weights!r}; give one number for each dataset, such as 2, 1.") from error


class ConvertCLIPCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "ConvertCLIPCaptions",
            "Convert CLIP Captions",
            "dataset",
            "Writes the captions of a dataset in another format, for other programs: into a new folder in "
            "ComfyUI's datasets folder, with the images. The original folder is left unchanged.",
            aliases="kohya, metadata.jsonl, caption files, export captions, csv",
            inputs=[
                folder_input(),
                io.Combo.Input(
                    "to",
                    options=list(WRITERS),
                    default="sidecar",
                    tooltip="json: a labels JSON. sidecar: a text file beside each image. kohya: meta_cap.json. "
                    "metadata: Hugging Face's metadata.jsonl. csv: image,caption. coco: COCO's captions.",
                ),
                captions_input(advanced=True),
                *_column_inputs(),
            ],
            outputs=dict(folder=io.String),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **widgets: Any) -> Sequence[Any]:
        return dataset_fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, to: str, captions: str = "auto", **columns: str) -> io.NodeOutput:
        display = Display(cls)
        dataset = load_dataset(folders.find_dataset(folder), captions, **columns)
        path = folders.new_dataset_path(f"{folder}_{to}")

        def on_progress(done: int, total: int) -> None:
            check_cancelled()
            display.progress(done, total)

        display.notes(convert_captions(dataset, to, path, on_progress=on_progress))
        return io.NodeOutput(path.name)


NODES = [LoadCLIPDataset, CLIPDatasetFromImages, CombineCLIPDatasets, ConvertCLIPCaptions]
