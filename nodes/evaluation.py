"""Nodes that measure models."""

from __future__ import annotations

import contextlib
import functools

from comfy_api.latest import io, ui

from ..engine.data.images.image_cache import ImageCache
from ..engine.evaluate import suite
from ..engine.evaluate.comparison import notes_of
from ..engine.evaluate.encoder import EncodingCache
from ..engine.evaluate.zero_shot import PROTOCOLS, TEMPLATES
from ..engine.report.image_charts import chart_with_sheet
from . import host
from .sockets import CATEGORY, Dataset, FullClip


@functools.cache
def feature_cache() -> EncodingCache:
    """What evaluations computed since ComfyUI started: a model encodes a picture once, whatever measures it."""
    return EncodingCache()


def evaluation_inputs(*more):
    return [
        FullClip.Input("full_clip"),
        Dataset.Input("dataset"),
        FullClip.Input("baseline", optional=True, tooltip="The model to compare with, such as the original."),
        *more,
    ]


def evaluation_outputs(number: str):
    return [
        io.Float.Output(display_name=number),
        io.String.Output(display_name="table"),
        io.Image.Output(display_name="chart"),
    ]


def evaluate(cls, evaluator, request, full_clip, dataset, baseline):
    """Measure one or two models and return the outputs: the model's score, the table and the chart."""
    display = host.Display(cls.hidden.unique_id)
    results = {}
    cache = ImageCache(host.image_cache_folder(), say=display.say)
    with host.whole_device(), contextlib.closing(cache):
        for name, full in (("baseline", baseline), ("model", full_clip)):
            if full is not None:
                results[name] = suite.measure(
                    evaluator,
                    full,
                    dataset,
                    request,
                    device=host.device(),
                    cache=cache,
                    features=feature_cache(),
                    on_progress=display.count,
                    check_cancelled=host.check_cancelled,
                )
    model, before = results["model"], results.get("baseline")
    for note in notes_of(model.notes, before and before.notes):
        display.say(note)
    sentence = evaluator.sentence(model, before)
    display.conclude(sentence, *evaluator.remarks(model, before))
    heading, examples = evaluator.examples(dataset, model, before)
    chart = host.image_tensor(chart_with_sheet(evaluator.chart(results, sentence), examples, f"{heading}:"))
    table = evaluator.table(results)
    return io.NodeOutput(evaluator.score(model), table, chart, ui=ui.PreviewImage(chart, cls=cls))


class EvalZeroShot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EvalZeroShot",
            display_name="Evaluate Zero-Shot",
            category=CATEGORY,
            description="How many pictures of a labelled folder (a subfolder for each class) the model puts into the "
            "right class by its name alone.",
            inputs=evaluation_inputs(
                io.Combo.Input(
                    "templates",
                    options=list(TEMPLATES),
                    default="openai-80",
                    optional=True,
                    tooltip="Sentences that a class name is put into: OpenAI's 80, a short set, none, or your own.",
                ),
                io.String.Input(
                    "custom_templates",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For templates: custom. One sentence a line, with {} where the class name goes.",
                ),
                io.Combo.Input(
                    "protocol",
                    options=list(PROTOCOLS),
                    default="whole set",
                    optional=True,
                    advanced=True,
                    tooltip="published: the table also tells how many pictures know their label among the 48 of a "
                    "shuffled batch, which was published as the accuracy of fine-tunes, and is none.",
                ),
            ),
            outputs=evaluation_outputs("accuracy"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, full_clip, dataset, baseline=None, templates="openai-80", custom_templates="", protocol="whole set"
    ):
        custom = tuple(custom_templates.splitlines())
        request = suite.Request(templates=templates, custom_templates=custom, protocol=protocol)
        return evaluate(cls, suite.ZERO_SHOT, request, full_clip, dataset, baseline)


class EvalRetrieval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EvalRetrieval",
            display_name="Evaluate Retrieval",
            category=CATEGORY,
            description="How often a picture finds one of its captions first among all captions, and a caption its "
            "picture among all pictures.",
            inputs=evaluation_inputs(),
            outputs=evaluation_outputs("recall_at_1"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, dataset, baseline=None):
        return evaluate(cls, suite.RETRIEVAL, suite.Request(), full_clip, dataset, baseline)


NODES = [EvalZeroShot, EvalRetrieval]
