"""Nodes that lay a model over its baseline: compare, plot GmP, blend."""

from __future__ import annotations

import contextlib

from comfy_api.latest import io, ui

from ..engine.clip.blend import blend
from ..engine.data.images.image_cache import ImageCache
from ..engine.evaluate.comparison import compare_full_clips
from ..engine.evaluate.drift import PROMPTS
from ..engine.evaluate.gmp_form import gmp_form
from ..engine.evaluate.sweep import blend_sweep
from ..engine.evaluate.zero_shot import TEMPLATES
from . import host
from .evaluation import feature_cache
from .sockets import CATEGORY, Dataset, FullClip

_BASELINE_TOOLTIP = "The model that the training began from."


class CompareFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CompareFullCLIP",
            display_name="Compare Full CLIP",
            category=CATEGORY,
            description="Is the trained model sound? Shows how its embeddings, its weights and what image models read "
            "of it have changed, before any picture is generated.",
            inputs=[
                FullClip.Input("full_clip"),
                FullClip.Input("baseline", tooltip=_BASELINE_TOOLTIP),
                Dataset.Input("dataset", tooltip="Pictures that were not trained on, some hundred at least."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What you ask image models for, one prompt a line, to see how far their conditioning has "
                    "moved. Empty: a list of common ones.",
                ),
            ],
            outputs=[io.String.Output(display_name="table"), io.Image.Output(display_name="chart")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, baseline, dataset, prompts=""):
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        with _measuring(cls) as (display, measuring):
            found = compare_full_clips(full_clip, baseline, dataset, prompts=lines or PROMPTS, **measuring)
        display.conclude(*found.verdict, *found.notes)
        chart = host.image_tensor(found.chart())
        return io.NodeOutput(found.table(), chart, ui=ui.PreviewImage(chart, cls=cls))


class PlotGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PlotGmP",
            display_name="Plot GmP",
            category=CATEGORY,
            description="How long the rows of the MLP weights are (r) and where they point (theta), by tower and "
            "depth, before and after a training.",
            inputs=[
                FullClip.Input("full_clip"),
                FullClip.Input("baseline", optional=True, tooltip=_BASELINE_TOOLTIP),
            ],
            outputs=[io.Image.Output(display_name="chart")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, baseline=None):
        display = host.Display(cls.hidden.unique_id)
        with host.whole_device():
            found = gmp_form(
                full_clip,
                baseline,
                device=host.device(),
                on_progress=display.count,
                check_cancelled=host.check_cancelled,
            )
        display.conclude(found.sentence, *found.notes)
        chart = host.image_tensor(found.chart())
        return io.NodeOutput(chart, ui=ui.PreviewImage(chart, cls=cls))


class BlendFullCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BlendFullCLIP",
            display_name="Blend Full CLIP",
            category=CATEGORY,
            description="Mixes the weights of a trained model with those of the one that it was made from: often as "
            "good on the new pictures, and better on everything else.",
            search_aliases=["wise-ft", "interpolate clip"],
            inputs=[
                FullClip.Input("full_clip"),
                FullClip.Input("baseline", tooltip=_BASELINE_TOOLTIP),
                io.Float.Input(
                    "alpha",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="1 is full_clip, 0 is baseline, 0.5 half of each. Above 1 goes further than the training.",
                ),
            ],
            outputs=[FullClip.Output(display_name="full_clip")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, full_clip, baseline, alpha=0.5):
        return io.NodeOutput(blend(full_clip, baseline, alpha))


class BlendSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BlendSweep",
            display_name="Blend Sweep",
            category=CATEGORY,
            description="Measures blends of a trained model and the one that it was made from, from one to the other, "
            "and gives the best.",
            search_aliases=["wise-ft"],
            inputs=[
                FullClip.Input("full_clip"),
                FullClip.Input("baseline", tooltip=_BASELINE_TOOLTIP),
                Dataset.Input("dataset", tooltip="What the model was trained for: validation pictures."),
                Dataset.Input(
                    "general",
                    optional=True,
                    tooltip="What the model must not forget: labelled pictures of other things.",
                ),
                io.Int.Input(
                    "steps",
                    default=11,
                    min=2,
                    max=101,
                    optional=True,
                    advanced=True,
                    tooltip="How many blends are measured, evenly spaced; 11 is every tenth.",
                ),
                io.Combo.Input(
                    "templates",
                    options=[name for name in TEMPLATES if name != "custom"],
                    default="openai-80",
                    optional=True,
                    advanced=True,
                    tooltip="Sentences that a class name is put into, for labelled pictures. simple is much faster "
                    "where there are many classes.",
                ),
            ],
            outputs=[
                FullClip.Output(display_name="full_clip"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="table"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, baseline, dataset, general=None, steps=11, templates="openai-80"):
        with _measuring(cls) as (display, measuring):
            found = blend_sweep(full_clip, baseline, dataset, general, steps=steps, templates=templates, **measuring)
        display.conclude(found.sentence, found.rule, *found.notes)
        chart = host.image_tensor(found.chart())
        return io.NodeOutput(found.best, chart, found.table(), ui=ui.PreviewImage(chart, cls=cls))


@contextlib.contextmanager
def _measuring(cls):
    """(a display, what engine functions want of the host), while ComfyUI's own models are off the device."""
    display = host.Display(cls.hidden.unique_id)
    cache = ImageCache(host.image_cache_folder(), on_note=display.say)
    with host.whole_device(), contextlib.closing(cache):
        yield (
            display,
            {
                "device": host.device(),
                "cache": cache,
                "features": feature_cache(),
                "on_progress": display.count,
                "check_cancelled": host.check_cancelled,
            },
        )


NODES = [CompareFullCLIP, PlotGmP, BlendFullCLIP, BlendSweep]
