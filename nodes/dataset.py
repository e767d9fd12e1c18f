"""Nodes that open data sets, make and join them, and write their captions in another format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from comfy_api.latest import io

from ..engine.data.from_images import dataset_from_images
from ..engine.data.load import combine_datasets, load_dataset
from ..engine.data.readers.coco import coco_file_beside
from ..engine.data.readers.registry import FORMAT_NAMES, WRITABLE_FORMATS
from ..engine.data.splits import split_dataset
from ..engine.data.tools.convert import convert_captions
from ..engine.errors import UserError
from . import host
from .sockets import CATEGORY, Dataset

_FOLDER_TOOLTIP = "Press R after adding a folder."
_CAPTIONS_TOOLTIP = "Where the captions are: auto recognises it."
_MOST_DATASETS = 32


def _column_inputs():
    return [
        io.String.Input(
            "image_column",
            default="",
            optional=True,
            advanced=True,
            tooltip="Of a table: the column with the pictures' names. Empty: it is recognised.",
        ),
        io.String.Input(
            "caption_column",
            default="",
            optional=True,
            advanced=True,
            tooltip="Of a table: the column with captions, or several, separated by commas. Empty: it is recognised.",
        ),
    ]


def _open(folder, captions, image_column, caption_column):
    return load_dataset(host.find_dataset(folder), captions, image_column=image_column, caption_column=caption_column)


def _fingerprint(folder):
    if folder not in host.list_datasets():
        return (folder,)
    place = host.find_dataset(folder)
    return [*host.folder_fingerprint(place), host.file_fingerprint(str(coco_file_beside(Path(place))))]


class LoadCLIPDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadCLIPDataset",
            display_name="Load CLIP Dataset",
            category=CATEGORY,
            description="Opens a folder of captioned pictures: text files beside the pictures, a labels JSON, a CSV "
            "with the columns image and caption, what kohya's scripts, COCO and Hugging Face have, or a subfolder for "
            "each class. The folder lies in ComfyUI's datasets or input folder, or, with captions beside the pictures, "
            "in its output folder.",
            search_aliases=["captions", "training images", "kohya", "coco"],
            inputs=[
                io.Combo.Input("folder", options=host.list_datasets(), tooltip=_FOLDER_TOOLTIP),
                io.Combo.Input(
                    "captions", options=list(FORMAT_NAMES), default="auto", optional=True, tooltip=_CAPTIONS_TOOLTIP
                ),
                io.Float.Input(
                    "validation_split",
                    default=0.1,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    optional=True,
                    tooltip="The share of the pictures that is kept from training, to measure on.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    optional=True,
                    tooltip="Which pictures are kept for validation.",
                ),
                *_column_inputs(),
            ],
            outputs=[Dataset.Output(display_name="train"), Dataset.Output(display_name="validation")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **widgets):
        return _fingerprint(folder)

    @classmethod
    def execute(cls, folder, captions="auto", validation_split=0.1, seed=0, image_column="", caption_column=""):
        opened = _open(folder, captions, image_column, caption_column)
        train, validation = split_dataset(opened, validation_split, seed)
        display = host.Display(cls.hidden.unique_id)
        display.say(f"{len(train)} pictures to train on, {len(validation)} to validate on: {opened.reason}.")
        for note in opened.notes:
            display.say(note)
        return io.NodeOutput(train, validation)


class CLIPDatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPDatasetFromImages",
            display_name="CLIP Dataset from Images",
            category=CATEGORY,
            description="Makes a data set of the images and captions of other nodes: of any captioner, for example. "
            "The images are kept as files in ComfyUI's temp folder.",
            search_aliases=["captioner", "image list", "image to dataset"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A list of images, or a batch."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip="A text for each image, or for each batch; every line in it is a caption.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, captions):
        display = host.Display(cls.hidden.unique_id)
        dataset = dataset_from_images(
            _pictures(images, display), _texts(images, captions), host.prepared_images_folder()
        )
        display.say(f"{len(dataset)} pictures with captions.")
        for note in dataset.notes:
            display.say(note)
        return io.NodeOutput(dataset)


def _pictures(batches: Sequence, display: host.Display) -> Iterator:
    """Each picture of the batches as a uint8 array; one at a time, so that no second copy of them all is made."""
    for done, batch in enumerate(batches, 1):
        for image in batch:
            host.check_cancelled()
            yield host.image_array(image)
        display.count(done, len(batches))


def _texts(batches: Sequence, captions: Sequence[str]) -> list[str]:
    """A text for each picture: those of a batch share one if there is one a batch."""
    if len(captions) != len(batches):
        return list(captions)
    return [caption for batch, caption in zip(batches, captions, strict=True) for _ in batch]


class CombineCLIPDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CombineCLIPDatasets",
            display_name="Combine CLIP Datasets",
            category=CATEGORY,
            description="Makes one data set of several, to train on all of them together.",
            search_aliases=["merge datasets", "join", "concatenate"],
            inputs=[
                io.Autogrow.Input(
                    "datasets",
                    template=io.Autogrow.TemplateNames(
                        Dataset.Input("dataset"), names=[f"dataset_{n}" for n in range(1, _MOST_DATASETS + 1)], min=1
                    ),
                    tooltip="Another input appears for each that is connected.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    tooltip="How often the pictures of each data set come beside those of the others, such as 2, 1. "
                    "Empty: all equally often.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, datasets: io.Autogrow.Type, weights=""):
        names = sorted(datasets, key=lambda name: int(name.rpartition("_")[2]))
        combined = combine_datasets([datasets[name] for name in names], _numbers(weights))
        display = host.Display(cls.hidden.unique_id)
        drawn = sum(combined.repeats) if combined.repeats else len(combined)
        display.say(f"{len(combined)} pictures; an epoch draws {drawn}.")
        return io.NodeOutput(combined)


def _numbers(weights: str) -> list[float] | None:
    try:
        return [float(word) for word in re.split(r"[\s,;]+", weights.strip()) if word] or None
    except ValueError as error:
        raise UserError(f"weights is {weights!r}; give a number for each data set, such as 2, 1.") from error


class ConvertCLIPCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConvertCLIPCaptions",
            display_name="Convert CLIP Captions",
            category=CATEGORY,
            description="Writes a folder's captions in another format, for other programs, into a new folder in "
            "ComfyUI's datasets folder, with the pictures. The old folder stays as it is.",
            search_aliases=["kohya", "metadata.jsonl", "caption files"],
            inputs=[
                io.Combo.Input("folder", options=host.list_datasets(), tooltip=_FOLDER_TOOLTIP),
                io.Combo.Input(
                    "to",
                    options=list(WRITABLE_FORMATS),
                    default="sidecar",
                    tooltip="json: a labels JSON. sidecar: a text file beside each picture. kohya: meta_cap.json. "
                    "metadata: Hugging Face's metadata.jsonl. csv: image,caption. coco: COCO's captions.",
                ),
                io.Combo.Input(
                    "captions",
                    options=list(FORMAT_NAMES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=_CAPTIONS_TOOLTIP,
                ),
                *_column_inputs(),
            ],
            outputs=[io.String.Output(display_name="folder")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **widgets):
        return _fingerprint(folder)

    @classmethod
    def execute(cls, folder, to, captions="auto", image_column="", caption_column=""):
        display = host.Display(cls.hidden.unique_id)
        opened = _open(folder, captions, image_column, caption_column)
        name, place = host.new_dataset_folder(f"{folder}_{to}")

        def count(done: int, total: int) -> None:
            host.check_cancelled()
            display.count(done, total)

        for sentence in convert_captions(opened, to, place, on_progress=count):
            display.say(sentence)
        return io.NodeOutput(name)


NODES = [LoadCLIPDataset, CLIPDatasetFromImages, CombineCLIPDatasets, ConvertCLIPCaptions]
