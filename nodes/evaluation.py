"""Nodes that measure a model, beside a baseline if there is one, and what all evaluation nodes share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from comfy_api.latest import io, ui

from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.data.images.image_cache import ImageCache
from ..engine.evaluate import suite
from ..engine.evaluate.comparison import notes_of
from ..engine.evaluate.encoder import EncodingCache, Runtime
from ..engine.evaluate.zero_shot import PROTOCOLS, TEMPLATES
from ..engine.report.image_charts import chart_with_sheet
from .host import folders
from .host.device import check_cancelled, exclusive_device, torch_device
from .host.display import Display, to_tensor
from .schema import baseline_input, node_schema, widget
from .sockets import Dataset, FullClip


@functools.cache
def feature_cache() -> EncodingCache:
    """Return the features computed since ComfyUI started: several evaluations share one pass over the images."""
    return EncodingCache()


@contextlib.contextmanager
def evaluating(display: Display) -> Iterator[Runtime]:
    """Yield the keyword arguments that evaluations take from the host, with ComfyUI's models off the device."""
    cache = ImageCache(folders.image_cache_folder(), on_note=display.note)
    with exclusive_device(), contextlib.closing(cache):
        yield {
            "device": torch_device(),
            "cache": cache,
            "features": feature_cache(),
            "on_progress": display.progress,
            "check_cancelled": check_cancelled,
        }


def evaluate(
    cls: type[io.ComfyNode],
    evaluator: suite.Evaluator[suite.R],
    request: suite.Request,
    full_clip: FullCLIP,
    dataset: ClipDataset,
    baseline: FullCLIP | None,
) -> io.NodeOutput:
    """Measure the model and, if there is one, the baseline; return the model's score, the table and the chart."""
    display = Display(cls)
    models = {"model": full_clip} if baseline is None else {"baseline": baseline, "model": full_clip}
    with evaluating(display) as runtime:
        results = {name: suite.measure(evaluator, each, dataset, request, **runtime) for name, each in models.items()}
    model, before = results["model"], results.get("baseline")
    display.notes(notes_of(model.notes, None if before is None else before.notes))
    sentence = evaluator.sentence(model, before)
    display.conclude(sentence, *evaluator.remarks(model, before))
    heading, examples = evaluator.examples(dataset, model, before)
    image = to_tensor(chart_with_sheet(evaluator.chart(results, sentence), examples, f"{heading}:"))
    return io.NodeOutput(evaluator.score(model), evaluator.table(results), image, ui=ui.PreviewImage(image, cls=cls))


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
        custom = tuple(custom_templates.splitlines())
        request = suite.Request(templates=templates, custom_templates=custom, protocol=protocol)
        return evaluate(cls, suite.ZERO_SHOT, request, full_clip, dataset, baseline)


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
        return evaluate(cls, suite.RETRIEVAL, suite.Request(), full_clip, dataset, baseline)


NODES = [EvalZeroShot, EvalRetrieval]
