"""Nodes that measure models."""

from __future__ import annotations

import contextlib

from comfy_api.latest import io, ui

from ..engine.data.cache import PictureCache
from ..engine.evaluate.retrieval import eval_retrieval
from ..engine.evaluate.together import percent
from ..engine.evaluate.zero_shot import TEMPLATES, eval_zero_shot
from ..engine.report.charts import against_baseline, bar_chart
from ..engine.report.tables import table
from . import host
from .sockets import CATEGORY, Dataset, FullClip


def _inputs(*more):
    return [
        FullClip.Input("full_clip"),
        Dataset.Input("dataset"),
        FullClip.Input("baseline", optional=True, tooltip="The model to compare with, such as the original."),
        *more,
    ]


def _outputs(number: str):
    return [
        io.Float.Output(display_name=number),
        io.String.Output(display_name="table"),
        io.Image.Output(display_name="chart"),
    ]


def _measure(cls, evaluate, full_clip, baseline):
    """{"model": result} and, where there is one, {"baseline": result}, with progress and notes shown."""
    display = host.Display(cls.hidden.unique_id)
    results = {}
    cache = PictureCache(host.picture_cache_folder(), say=display.say)
    with host.whole_device(), contextlib.closing(cache):
        for name, model in (("baseline", baseline), ("model", full_clip)):
            if model is not None:
                results[name] = evaluate(
                    model, device=host.device(), cache=cache, on_progress=display.count,
                    check_cancelled=host.check_cancelled,
                )  # fmt: skip
    for note in results["model"].notes:
        display.say(note)
    return results, display


def _shown(cls, display, what, results, number, measures, drawn):
    """The outputs of a node: `number` of the model, a table with a row a measure, and a chart of those in `drawn`."""
    before = number(results["baseline"]) if "baseline" in results else None
    sentence = against_baseline(what, number(results["model"]), before)
    rows = [
        {what: name} | {model: percent(measure(found)) for model, found in results.items()}
        for name, measure in measures.items()
    ]
    groups = {
        name.replace(" R@", "\nR@"): {model: measures[name](found) for model, found in results.items()}
        for name in drawn
    }
    display.say(sentence)
    chart = host.image_tensor(bar_chart(groups, title=sentence))
    return io.NodeOutput(number(results["model"]), table(rows), chart, ui=ui.PreviewImage(chart, cls=cls))


class EvalZeroShot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EvalZeroShot",
            display_name="Evaluate Zero-Shot",
            category=CATEGORY,
            description="How many pictures of a labelled folder (a subfolder for each class) the model puts into the "
            "right class by its name alone.",
            inputs=_inputs(
                io.Combo.Input(
                    "templates", options=list(TEMPLATES), default="openai-80", optional=True,
                    tooltip="Sentences that a class name is put into: OpenAI's 80, a short set, none, or your own.",
                ),
                io.String.Input(
                    "custom_templates", default="", multiline=True, optional=True,
                    tooltip="For templates: custom. One sentence a line, with {} where the class name goes.",
                ),
            ),
            outputs=_outputs("accuracy"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, full_clip, dataset, baseline=None, templates="openai-80", custom_templates=""):
        def evaluate(model, **host_calls):
            return eval_zero_shot(
                model, dataset, templates=templates, custom_templates=custom_templates.splitlines(), **host_calls
            )

        results, display = _measure(cls, evaluate, full_clip, baseline)
        measures = {
            "top 1": lambda found: found.top1,
            "top 5": lambda found: found.top5,
            "mean of classes": lambda found: found.mean_per_class,
        }
        return _shown(cls, display, "Zero-shot accuracy", results, lambda found: found.top1, measures, list(measures))


class EvalRetrieval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EvalRetrieval",
            display_name="Evaluate Retrieval",
            category=CATEGORY,
            description="How often a picture finds one of its captions first among all captions, and a caption its "
            "picture among all pictures.",
            inputs=_inputs(),
            outputs=_outputs("recall_at_1"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, dataset, baseline=None):
        results, display = _measure(
            cls, lambda model, **host_calls: eval_retrieval(model, dataset, **host_calls), full_clip, baseline
        )
        measures = {
            f"{words} R@{k}": lambda found, side=side, k=k: getattr(found, side)[f"r{k}"]
            for words, side in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
            for k in (1, 5, 10)
        }
        drawn = [name for name in measures if not name.endswith("R@10")]
        return _shown(cls, display, "Recall at 1", results, lambda found: found.recall_at_1, measures, drawn)


NODES = [EvalZeroShot, EvalRetrieval]
