"""Nodes that look at a model beside the one it was trained from: compare, plot GmP, blend."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..engine.clip.blend import blend
from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.evaluate.comparison import compare_full_clips
from ..engine.evaluate.drift import PROMPTS
from ..engine.evaluate.gmp_form import gmp_form
from ..engine.evaluate.sweep import blend_sweep
from ..engine.evaluate.zero_shot import TEMPLATES
from .evaluation import evaluating
from .host.device import check_cancelled, exclusive_device, torch_device
from .host.display import Display, to_tensor
from .schema import baseline_input, node_schema, widget
from .sockets import Dataset, FullClip


class CompareFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "CompareFullCLIP",
            "Compare Full CLIP",
            "evaluate",
            "Checks whether the training damaged the model: shows how its embeddings, its weights and the "
            "conditioning that image models read have changed, before you generate an image.",
            aliases="drift, is my clip broken, pca, modality gap, before and after, health",
            inputs=[
                FullClip.Input("full_clip"),
                baseline_input(),
                Dataset.Input("dataset", tooltip="Images that were not trained on, at least some hundred."),
                widget(
                    "prompts",
                    "",
                    "Prompts that you use, one per line, to measure how far their conditioning has moved. "
                    "Empty: a list of common prompts.",
                    multiline=True,
                ),
            ],
            outputs=dict(table=io.String, chart=io.Image),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, baseline: FullCLIP, dataset: ClipDataset, prompts: str = "") -> io.NodeOutput:
        display = Display(cls)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        with evaluating(display) as host_arguments:
            comparison = compare_full_clips(full_clip, baseline, dataset, prompts=lines or PROMPTS, **host_arguments)
        display.conclude(*comparison.verdict, *comparison.notes)
        chart = to_tensor(comparison.chart())
        return io.NodeOutput(comparison.table(), chart, ui=ui.PreviewImage(chart, cls=cls))


class PlotGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PlotGmP",
            "Plot GmP",
            "evaluate",
            "Plots the length (r) and direction (theta) of the rows of the MLP weights, by tower and "
            "depth, before and after training.",
            aliases="geometric parameterization, weights, theta, chart",
            inputs=[FullClip.Input("full_clip"), baseline_input(optional=True)],
            outputs=dict(chart=io.Image),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, baseline: FullCLIP | None = None) -> io.NodeOutput:
        display = Display(cls)
        with exclusive_device():
            form = gmp_form(
                full_clip,
                baseline,
                device=torch_device(),
                on_progress=display.progress,
                check_cancelled=check_cancelled,
            )
        display.conclude(form.sentence, *form.notes)
        chart = to_tensor(form.chart())
        return io.NodeOutput(chart, ui=ui.PreviewImage(chart, cls=cls))


class BlendFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "BlendFullCLIP",
            "Blend Full CLIP",
            "model",
            "Mixes the weights of a trained model with those of the one it was trained from: often as good "
            "on the new images, and better on everything else.",
            aliases="wise-ft, interpolate clip, merge, mix, strength",
            inputs=[
                FullClip.Input("full_clip"),
                baseline_input(),
                widget(
                    "alpha",
                    0.5,
                    "1 is full_clip, 0 is baseline, 0.5 half of each. Above 1 exaggerates the training.",
                    min=0.0,
                    max=2.0,
                    step=0.05,
                ),
            ],
            outputs=dict(full_clip=FullClip),
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, baseline: FullCLIP, alpha: float = 0.5) -> io.NodeOutput:
        return io.NodeOutput(blend(full_clip, baseline, alpha))


class BlendSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "BlendSweep",
            "Blend Sweep",
            "evaluate",
            "Measures blends of a trained model and the one it was trained from, and returns the best.",
            aliases="wise-ft, interpolate clip, find best strength, merge",
            inputs=[
                FullClip.Input("full_clip"),
                baseline_input(),
                Dataset.Input("dataset", tooltip="What the model was trained for: validation images."),
                Dataset.Input(
                    "general",
                    optional=True,
                    tooltip="What the model must not forget: images of other things in a subfolder per class.",
                ),
                widget(
                    "steps",
                    11,
                    "Number of blends to measure, evenly spaced; 11 measures every tenth.",
                    min=2,
                    max=101,
                    advanced=True,
                ),
                widget(
                    "templates",
                    "openai-80",
                    "Sentences around each class name, for datasets with classes; simple is much faster.",
                    choices=[name for name in TEMPLATES if name != "custom"],
                    advanced=True,
                ),
            ],
            outputs=dict(full_clip=FullClip, chart=io.Image, table=io.String),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        full_clip: FullCLIP,
        baseline: FullCLIP,
        dataset: ClipDataset,
        general: ClipDataset | None = None,
        steps: int = 11,
        templates: str = "openai-80",
    ) -> io.NodeOutput:
        display = Display(cls)
        with evaluating(display) as host_arguments:
            sweep = blend_sweep(
                full_clip, baseline, dataset, general, steps=steps, templates=templates, **host_arguments
            )
        display.conclude(sweep.sentence, sweep.rule, *sweep.notes)
        chart = to_tensor(sweep.chart())
        return io.NodeOutput(sweep.best, chart, sweep.table(), ui=ui.PreviewImage(chart, cls=cls))


NODES = [CompareFullCLIP, PlotGmP, BlendFullCLIP, BlendSweep]
