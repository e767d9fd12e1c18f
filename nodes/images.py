"""Nodes that inspect a dataset's images and make new image folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..engine.data.dataset import ClipDataset
from ..engine.data.load import load_dataset
from ..engine.data.tools.findings import report_text
from ..engine.data.tools.inspect import inspect_dataset, sample_images
from ..engine.data.tools.prepare import Preparation, prepare_images
from ..engine.report.charts import dataset_chart
from ..engine.report.contact_sheet import contact_sheet
from ..engine.settings import setting_infos
from .dataset import dataset_fingerprint
from .host import folders
from .host.device import check_cancelled, torch_device
from .host.display import Display, to_tensor
from .schema import captions_input, folder_input, node_schema, seed_input, setting_input, widget
from .sockets import Dataset


class InspectCLIPDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "InspectCLIPDataset",
            "Inspect CLIP Dataset",
            "dataset",
            "Opens every image and reads every caption of a dataset: finds what is broken, duplicated, cut "
            "off or without a caption, and says what to do about it. Shows sample images with their captions, and "
            "charts.",
            aliases="duplicates, broken images, contact sheet, statistics, check dataset",
            inputs=[
                Dataset.Input("dataset"),
                widget("images", 24, "Number of images on the contact sheet.", min=1, max=200),
                seed_input("Decides which images are on the contact sheet."),
                widget(
                    "context_length",
                    77,
                    "Number of tokens the model reads; longer captions count as cut off.",
                    min=16,
                    max=4096,
                    advanced=True,
                ),
            ],
            outputs=dict(report=io.String, contact_sheet=io.Image, chart=io.Image),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset: ClipDataset, images: int = 24, seed: int = 0, context_length: int = 77) -> io.NodeOutput:
        display = Display(cls)
        findings = inspect_dataset(
            dataset, context_length=context_length, on_progress=display.progress, check_cancelled=check_cancelled
        )
        report = report_text(findings)
        display.conclude(*(paragraph.partition("\n")[0].rstrip(":") for paragraph in report.split("\n\n")))
        sheet = to_tensor(contact_sheet(sample_images(dataset, images, seed)))
        chart = dataset_chart(findings.token_counts, context_length, findings.sizes.tolist(), findings.classes)
        return io.NodeOutput(report, sheet, to_tensor(chart), ui=ui.PreviewImage(sheet, cls=cls))


class PrepareCLIPImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PrepareCLIPImages",
            "Prepare CLIP Images",
            "dataset",
            "Makes a new dataset folder from a folder of captioned images: copies in other colours, "
            "mirrored copies, squares from the middle or around objects. Captions are carried over, and the original "
            "folder is left unchanged. The new one is in ComfyUI's datasets folder.",
            aliases="augmentation, crop, color jitter, flip, mirror, object detection",
            inputs=[
                folder_input(),
                *(setting_input(info) for info in setting_infos(Preparation).values()),
                captions_input(advanced=True),
                widget("name", "", "Name of the new folder. Empty: the old name with _prepared."),
            ],
            outputs=dict(folder=io.String),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **widgets: Any) -> Sequence[Any]:
        return dataset_fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, captions: str = "auto", name: str = "", **settings: Any) -> io.NodeOutput:
        display = Display(cls)
        prepared = prepare_images(
            load_dataset(folders.find_dataset(folder), captions),
            folders.dataset_path(name.strip() or f"{folder}_prepared"),
            Preparation(**settings),
            number_if_taken=True,
            device=torch_device(),
            on_progress=display.progress,
            on_note=display.note,
            check_cancelled=check_cancelled,
        )
        new = prepared.folder.name
        display.note(
            f"{new} was made from these images with these settings before and is used again."
            if prepared.made_before
            else f"Made {new}: press R, and choose it in Load CLIP Dataset."
        )
        display.notes(prepared.notes)
        return io.NodeOutput(new)


NODES = [InspectCLIPDataset, PrepareCLIPImages]
