"""Nodes that measure models."""

from __future__ import annotations

import contextlib
import functools

from comfy_api.latest import io, ui

from ..engine.data.images.image_cache import ImageCache
from ..engine.evaluate.encoder import EncodingCache
from ..engine.evaluate.intervals import difference_interval
from ..engine.evaluate.retrieval import eval_retrieval
from ..engine.evaluate.suite import notes_of, percent
from ..engine.evaluate.zero_shot import PROTOCOLS, TEMPLATES, eval_zero_shot
from ..engine.report.attack_charts import share_chart
from ..engine.report.charts import against_baseline, bar_chart
from ..engine.report.tables import table
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


def measure(cls, evaluate, full_clip, baseline):
    """{"model": result} and, where there is one, {"baseline": result}, with progress and notes shown."""
    display = host.Display(cls.hidden.unique_id)
    results = {}
    cache = ImageCache(host.image_cache_folder(), on_note=display.say)
    with host.whole_device(), contextlib.closing(cache):
        for name, model in (("baseline", baseline), ("model", full_clip)):
            if model is not None:
                results[name] = evaluate(
                    model,
                    device=host.device(),
                    cache=cache,
                    features=feature_cache(),
                    on_progress=display.count,
                    check_cancelled=host.check_cancelled,
                )
    for note in notes_of(results["model"], results.get("baseline")):
        display.say(note)
    return results, display


def _rows(what, results, measures):
    """A row for each measure, in percent."""
    return [
        {what: name} | {model: percent(measure(found)) for model, found in results.items()}
        for name, measure in measures.items()
    ]


def _groups(results, measures):
    return {name: {model: measure(found) for model, found in results.items()} for name, measure in measures.items()}


def _sentence(what, results, number):
    before = number(results["baseline"]) if "baseline" in results else None
    return against_baseline(what, number(results["model"]), before)


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
        def evaluate(model, **host_calls):
            return eval_zero_shot(
                model,
                dataset,
                templates=templates,
                custom_templates=custom_templates.splitlines(),
                protocol=protocol,
                **host_calls,
            )

        results, display = measure(cls, evaluate, full_clip, baseline)
        found = results["model"]
        measures = {
            "top 1": lambda found: found.top1,
            "top 5": lambda found: found.top5,
            "mean of classes": lambda found: found.mean_per_class,
        }
        what = "Zero-shot accuracy"
        sentence = _sentence(what, results, lambda found: found.top1)
        if "baseline" in results and len(results["baseline"].right_first) == len(found.right_first):
            low, high = difference_interval(found.right_first, results["baseline"].right_first)
            display.say(f"With other pictures of this kind, top 1 may differ by {100 * low:+.1f} to {100 * high:+.1f}.")
        display.say(sentence)
        rows = _rows(what, results, measures)
        rows.insert(1, {what: "top 1 may be"} | {name: _interval(found) for name, found in results.items()})
        if protocol == "published":
            told = "1 of 48 labels (as published; no accuracy)"
            rows += _rows(what, results, {told: lambda found: found.in_batch})
        rows += [
            {what: f"class {name} ({found.per_class_images[name]})"}
            | {model: percent(result.per_class[name]) for model, result in results.items()}
            for name in found.per_class
        ]
        chart = host.image_tensor(
            share_chart(
                _groups(results, measures),
                title=sentence,
                intervals={"top 1": {model: result.top1_interval for model, result in results.items()}},
                confused={model: result.confused for model, result in results.items()},
            )
        )
        return io.NodeOutput(found.top1, table(rows), chart, ui=ui.PreviewImage(chart, cls=cls))


def _interval(found) -> str:
    low, high = found.top1_interval
    return f"{100 * low:.1f} to {high:.1%}"


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
        results, display = measure(
            cls, lambda model, **host_calls: eval_retrieval(model, dataset, **host_calls), full_clip, baseline
        )
        measures = {
            f"{words} R@{k}": lambda found, side=side, k=k: getattr(found, side)[f"r{k}"]
            for words, side in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
            for k in (1, 5, 10)
        }
        sentence = _sentence("Recall at 1", results, lambda found: found.recall_at_1)
        display.conclude(sentence, _ranks_in_words(results))
        drawn = {name.replace(" R@", "\nR@"): tell for name, tell in measures.items() if not name.endswith("R@10")}
        chart = host.image_tensor(bar_chart(_groups(results, drawn), title=sentence))
        rows = _rows("Recall", results, measures)
        return io.NodeOutput(results["model"].recall_at_1, table(rows), chart, ui=ui.PreviewImage(chart, cls=cls))


def _ranks_in_words(results) -> str:
    found = results["model"]
    return (
        f"For half of the pictures the right caption is among the first {found.image_to_text['median_rank']:.0f} of "
        f"{found.captions}, for half of the captions the right picture among the first "
        f"{found.text_to_image['median_rank']:.0f} of {found.images}."
    )


NODES = [EvalZeroShot, EvalRetrieval]
