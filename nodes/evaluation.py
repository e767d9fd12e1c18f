"""Nodes that measure a model, beside a baseline if there is one, and what all evaluation nodes share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from comfy_api.latest import io, ui
from PIL import Image

from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.data.images.image_cache import ImageCache
from ..engine.evaluate.encoder import EncodingCache
from ..engine.evaluate.intervals import difference_interval
from ..engine.evaluate.retrieval import RetrievalResult, eval_retrieval
from ..engine.evaluate.suite import notes_of, percent
from ..engine.evaluate.zero_shot import PROTOCOLS, TEMPLATES, ZeroShotResult, eval_zero_shot
from ..engine.report.attack_charts import share_chart
from ..engine.report.charts import against_baseline, bar_chart
from ..engine.report.tables import table
from .host import folders
from .host.device import check_cancelled, exclusive_device, torch_device
from .host.display import Display, to_tensor
from .schema import baseline_input, node_schema, widget
from .sockets import Dataset, FullClip

Result = TypeVar("Result")


@functools.cache
def feature_cache() -> EncodingCache:
    """Return the features computed since ComfyUI started: several evaluations share one pass over the images."""
    return EncodingCache()


@contextlib.contextmanager
def evaluating(display: Display) -> Iterator[dict[str, Any]]:
    """Yield the keyword arguments that evaluations take from the host, with ComfyUI's models off the device."""
    cache = ImageCache(folders.image_cache_folder(), say=display.note)
    with exclusive_device(), contextlib.closing(cache):
        yield {
            "device": torch_device(),
            "cache": cache,
            "features": feature_cache(),
            "on_progress": display.progress,
            "check_cancelled": check_cancelled,
        }


def evaluate_models(
    display: Display, evaluate: Callable[..., Result], full_clip: FullCLIP, baseline: FullCLIP | None
) -> dict[str, Result]:
    """Return the results of "model" and, if there is one, of "baseline"; shows their notes."""
    models = {"model": full_clip} if baseline is None else {"baseline": baseline, "model": full_clip}
    with evaluating(display) as host_arguments:
        results = {name: evaluate(model, **host_arguments) for name, model in models.items()}
    display.notes(notes_of(results["model"], results.get("baseline")))
    return results


def evaluation_schema(
    node_id: str, display_name: str, description: str, aliases: str, number: str, *widgets: io.Input
) -> io.Schema:
    """Return the schema of a node that measures a model on a dataset: a number, a table and a chart."""
    return node_schema(
        node_id,
        display_name,
        "evaluate",
        description,
        aliases=f"{aliases}, eval, measure, test clip, benchmark",
        inputs=[FullClip.Input("full_clip"), Dataset.Input("dataset"), baseline_input(optional=True), *widgets],
        outputs={number: io.Float, "table": io.String, "chart": io.Image},
        is_output_node=True,
    )


def evaluation_output(
    cls: type[io.ComfyNode], number: float, rows: list[dict[str, str]], chart: Image.Image
) -> io.NodeOutput:
    image = to_tensor(chart)
    return io.NodeOutput(number, table(rows), image, ui=ui.PreviewImage(image, cls=cls))


def _compare(what: str, results: Mapping[str, Result], number: Callable[[Result], float]) -> str:
    baseline = number(results["baseline"]) if "baseline" in results else None
    return against_baseline(what, number(results["model"]), baseline)


def _rows(
    heading: str, results: Mapping[str, Result], measures: Mapping[str, Callable[[Result], float | None]]
) -> list[dict[str, str]]:
    """Return a table row for each measure, with a column for each model, in percent."""
    return [
        {heading: name} | {model: percent(measure(result)) for model, result in results.items()}
        for name, measure in measures.items()
    ]


def _bars(
    results: Mapping[str, Result], measures: Mapping[str, Callable[[Result], float]]
) -> dict[str, dict[str, float]]:
    return {name: {model: measure(result) for model, result in results.items()} for name, measure in measures.items()}


class EvalZeroShot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return evaluation_schema(
            "EvalZeroShot",
            "Evaluate Zero-Shot",
            "Measures how many images of a folder with a subfolder per class the model assigns to the right class, by "
            "the class name alone.",
            "classification, imagenet, labels, class folders",
            "accuracy",
            widget(
                "templates",
                "openai-80",
                "Sentences around each class name: OpenAI's 80, a short set (much faster), none, or your own.",
                choices=TEMPLATES,
            ),
            widget(
                "custom_templates",
                "",
                "For templates: custom. One sentence per line, with {} in place of the class name.",
                multiline=True,
            ),
            widget(
                "protocol",
                "whole set",
                "published: adds the figure that was published as the accuracy of GmP fine-tunes (the right "
                "label among the 48 of a shuffled batch). It is not an accuracy.",
                choices=PROTOCOLS,
                advanced=True,
            ),
        )

    @classmethod
    def execute(
        cls,
        full_clip: FullCLIP,
        dataset: ClipDataset,
        baseline: FullCLIP | None = None,
        templates: str = "openai-80",
        custom_templates: str = "",
        protocol: str = "whole set",
    ) -> io.NodeOutput:
        display = Display(cls)
        evaluate = functools.partial(
            eval_zero_shot,
            dataset=dataset,
            templates=templates,
            custom_templates=custom_templates.splitlines(),
            protocol=protocol,
        )
        results = evaluate_models(display, evaluate, full_clip, baseline)
        sentence = _compare("Zero-shot accuracy", results, lambda result: result.top1)
        display.conclude(sentence, _difference_in_words(results))
        rows = _zero_shot_rows(results, published=protocol == "published")
        chart = share_chart(
            _bars(results, _ZERO_SHOT_MEASURES),
            title=sentence,
            intervals={"top 1": {name: result.top1_interval for name, result in results.items()}},
            confused={name: result.confused for name, result in results.items()},
        )
        return evaluation_output(cls, results["model"].top1, rows, chart)


_ZERO_SHOT_MEASURES: dict[str, Callable[[ZeroShotResult], float]] = {
    "top 1": lambda result: result.top1,
    "top 5": lambda result: result.top5,
    "mean of classes": lambda result: result.mean_per_class,
}


def _difference_in_words(results: Mapping[str, ZeroShotResult]) -> str:
    """Return the interval of the difference between the models; empty where their images do not match up."""
    model, baseline = results["model"].right_first, results["baseline"].right_first if "baseline" in results else None
    if model is None or baseline is None or len(model) != len(baseline):
        return ""
    low, high = difference_interval(model, baseline)
    return f"With other images of this kind, top 1 may differ by {100 * low:+.1f} to {100 * high:+.1f} points."


def _zero_shot_rows(results: Mapping[str, ZeroShotResult], *, published: bool) -> list[dict[str, str]]:
    heading = "Zero-shot accuracy"
    rows = _rows(heading, results, _ZERO_SHOT_MEASURES)
    rows.insert(1, {heading: "top 1, 95 % interval"} | {name: _interval(result) for name, result in results.items()})
    if published:
        rows += _rows(
            heading, results, {"1 of 48 labels (as published; not an accuracy)": lambda result: result.in_batch}
        )
    for name, images in results["model"].per_class_images.items():
        shares = {model: percent(result.per_class[name]) for model, result in results.items()}
        rows.append({heading: f"class {name} ({images})"} | shares)
    return rows


def _interval(result: ZeroShotResult) -> str:
    low, high = result.top1_interval
    return f"{100 * low:.1f} to {high:.1%}"


class EvalRetrieval(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return evaluation_schema(
            "EvalRetrieval",
            "Evaluate Retrieval",
            "Measures how often the model finds the right caption for an image, and the right image for a caption.",
            "search, captions, is it better",
            "recall_at_1",
        )

    @classmethod
    def execute(cls, full_clip: FullCLIP, dataset: ClipDataset, baseline: FullCLIP | None = None) -> io.NodeOutput:
        display = Display(cls)
        results = evaluate_models(display, functools.partial(eval_retrieval, dataset=dataset), full_clip, baseline)
        sentence = _compare("Recall at 1", results, lambda result: result.recall_at_1)
        display.conclude(sentence, _median_ranks_in_words(results["model"]))
        measures = {
            f"{direction} R@{k}": _recall(side, k)
            for direction, side in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
            for k in (1, 5, 10)
        }
        drawn = {name.replace(" R@", "\nR@"): get for name, get in measures.items() if not name.endswith("R@10")}
        chart = bar_chart(_bars(results, drawn), title=sentence)
        return evaluation_output(cls, results["model"].recall_at_1, _rows("Recall", results, measures), chart)


def _recall(side: str, k: int) -> Callable[[RetrievalResult], float]:
    return lambda result: getattr(result, side)[f"r{k}"]


def _median_ranks_in_words(result: RetrievalResult) -> str:
    return (
        f"For half of the images, the right caption is among the first {result.image_to_text['median_rank']:.0f} of "
        f"{result.captions}; for half of the captions, the right image is among the first "
        f"{result.text_to_image['median_rank']:.0f} of {result.images}."
    )


NODES = [EvalZeroShot, EvalRetrieval]
