"""Nodes that show what a model takes single pictures for: with words written on them, and beside some texts."""

from __future__ import annotations

from comfy_api.latest import io, ui
from PIL import Image

from ..engine.evaluate import suite
from ..engine.evaluate.comparison import notes_of
from ..engine.evaluate.ranking import rank_captions, rankings_chart, rankings_table
from ..engine.report.tables import percent
from . import host
from .evaluation import evaluate, evaluation_inputs, evaluation_outputs, feature_cache
from .sockets import CATEGORY, FullClip


class EvalTypographic(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EvalTypographic",
            display_name="Evaluate Typographic Attack",
            category=CATEGORY,
            description="How many pictures of a labelled folder the model still recognises with the name of another "
            "class written on them, and how often it believes the word; or the same on pictures that people wrote on.",
            search_aliases=["typographic attack", "SCAM", "robustness"],
            inputs=evaluation_inputs(
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=False,
                    optional=True,
                    tooltip="Which words are drawn, where, and in which fonts and colours.",
                ),
            ),
            outputs=evaluation_outputs("accuracy_under_attack"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, dataset, baseline=None, seed=0):
        request = suite.Request(templates="simple", typographic=True, seed=seed)
        return evaluate(cls, suite.TYPOGRAPHIC, request, full_clip, dataset, baseline)


class RankCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RankCaptions",
            display_name="Rank Captions",
            category=CATEGORY,
            description="What a model thinks of one picture: which of some texts it finds nearest to it, beside what "
            "the baseline finds.",
            search_aliases=["zero-shot", "classify image", "compare captions", "softmax"],
            inputs=[
                FullClip.Input("full_clip"),
                io.Image.Input("image", tooltip="The first image of a batch is ranked."),
                io.String.Input(
                    "texts", default="a photo of a cat\na photo of a dog", multiline=True, tooltip="One text a line."
                ),
                FullClip.Input("baseline", optional=True, tooltip="The model to compare with, such as the original."),
            ],
            outputs=[io.Image.Output(display_name="chart"), io.String.Output(display_name="table")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, full_clip, image, texts, baseline=None):
        display = host.Display(cls.hidden.unique_id)
        picture = _pil(host.image_array(image[0]))
        found = {}
        with host.whole_device():
            for name, model in (("model", full_clip), ("baseline", baseline)):
                if model is not None:
                    host.check_cancelled()
                    found[name] = rank_captions(
                        model, picture, texts.splitlines(), device=host.device(), features=feature_cache()
                    )
        model, before = found["model"], found.get("baseline")
        more = [f"{len(image)} images came; the first is ranked."] if len(image) > 1 else []
        for note in (*notes_of(model.notes, before and before.notes), *more):
            display.say(note)
        first = model.order[0]
        sentence = f"Nearest: “{model.texts[first]}” ({percent(model.shares[first])})"
        if before:
            sentence += f"; the baseline finds “{before.texts[before.order[0]]}”"
        display.say(f"{sentence}.")
        chart = host.image_tensor(rankings_chart(picture, found))
        return io.NodeOutput(chart, rankings_table(found), ui=ui.PreviewImage(chart, cls=cls))


def _pil(array):
    return Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0])


NODES = [EvalTypographic, RankCaptions]
