"""Nodes that look into data sets and make new ones out of them."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from comfy_api.latest import io, ui

from ..engine.data.load import load_dataset
from ..engine.data.readers.registry import FORMAT_NAMES
from ..engine.data.tools.findings import report_text
from ..engine.data.tools.inspect import inspect_dataset, sample_images
from ..engine.data.tools.prepare import Preparation, prepare_images
from ..engine.report.charts import dataset_chart
from ..engine.report.contact_sheet import contact_sheet
from . import host
from .sockets import CATEGORY, Dataset


class InspectCLIPDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InspectCLIPDataset",
            display_name="Inspect CLIP Dataset",
            category=CATEGORY,
            description="Opens every picture and reads every caption of a data set: what is broken, twice there, cut "
            "off or without a caption, and what to do about it; some pictures with their captions; charts.",
            search_aliases=["duplicates", "broken images", "contact sheet", "statistics"],
            inputs=[
                Dataset.Input("dataset"),
                io.Int.Input(
                    "pictures",
                    default=24,
                    min=1,
                    max=200,
                    optional=True,
                    tooltip="How many pictures are on the contact sheet.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    optional=True,
                    tooltip="Which pictures are on the contact sheet.",
                ),
                io.Int.Input(
                    "context_length",
                    default=77,
                    min=16,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="How many tokens the model reads; longer captions are counted as cut off.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="contact_sheet"),
                io.Image.Output(display_name="chart"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset, pictures=24, seed=0, context_length=77):
        display = host.Display(cls.hidden.unique_id)
        found = inspect_dataset(
            dataset, context_length=context_length, on_progress=display.count, check_cancelled=host.check_cancelled
        )
        report = report_text(found)
        for paragraph in reversed(report.split("\n\n")):  # the page shows what was said last first
            display.say(paragraph.partition("\n")[0].rstrip(":"))
        sheet = host.image_tensor(contact_sheet(sample_images(dataset, pictures, seed)))
        chart = dataset_chart(found.token_counts, context_length, found.sizes.tolist(), found.classes)
        return io.NodeOutput(report, sheet, host.image_tensor(chart), ui=ui.PreviewImage(sheet, cls=cls))


def _preparation_inputs():
    """A widget for each field of `Preparation`."""
    kinds = get_type_hints(Preparation)
    for field in dataclasses.fields(Preparation):
        limits, kind = field.metadata, kinds[field.name]
        common = {
            "default": field.default,
            "optional": True,
            "tooltip": limits["help"],
            "advanced": limits["advanced"],
        }
        ends = {"min": limits["min"], "max": limits["max"]}
        if limits["choices"]:
            yield io.Combo.Input(field.name, options=list(limits["choices"]), **common)
        elif kind is str:
            yield io.String.Input(field.name, **common)
        elif kind is float:
            yield io.Float.Input(field.name, **ends, step=limits["step"], **common)
        elif field.name == "seed":
            yield io.Int.Input(field.name, **ends, control_after_generate=False, **common)
        else:
            yield io.Int.Input(field.name, **ends, **common)


class PrepareCLIPImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrepareCLIPImages",
            display_name="Prepare CLIP Images",
            category=CATEGORY,
            description="Makes a new folder out of a folder of captioned pictures: copies in other colours, mirrored "
            "copies, squares out of the middle or around objects. Captions are carried over; the old folder stays as "
            "it is. The new one is in ComfyUI's datasets folder.",
            search_aliases=["augmentation", "crop", "color jitter", "flip", "object detection"],
            inputs=[
                io.Combo.Input("folder", options=host.list_datasets(), tooltip="Press R after adding a folder."),
                *_preparation_inputs(),
                io.Combo.Input(
                    "captions",
                    options=list(FORMAT_NAMES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Where the captions are: auto recognises it.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Of the new folder. Empty: that of the old one and _prepared.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **widgets):
        return host.folder_fingerprint(host.find_dataset(folder)) if folder in host.list_datasets() else (folder,)

    @classmethod
    def execute(cls, folder, captions="auto", name="", **settings):
        display = host.Display(cls.hidden.unique_id)
        prepared = prepare_images(
            load_dataset(host.find_dataset(folder), captions),
            host.dataset_path(name.strip() or f"{folder}_prepared"),
            Preparation(**settings),
            number_if_taken=True,
            device=host.device(),
            on_progress=display.count,
            on_note=display.say,
            check_cancelled=host.check_cancelled,
        )
        made = prepared.folder.name
        display.say(
            f"{made} was made of these pictures with these settings before; it is used as it is."
            if prepared.made_before
            else f"Made {made}: press R, and choose it in Load CLIP Dataset."
        )
        for note in prepared.notes:
            display.say(note)
        return io.NodeOutput(made)


NODES = [InspectCLIPDataset, PrepareCLIPImages]
