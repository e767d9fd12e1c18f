"""Nodes that show what a model takes single pictures for: with words written on them, and beside some texts."""

from __future__ import annotations

from comfy_api.latest import io, ui
from PIL import Image

from ..engine.evaluate.ranking import rank_captions
from ..engine.evaluate.suite import notes_of, percent
from ..engine.evaluate.typographic.attack import eval_typographic, sheet_heading, sheet_of
from ..engine.evaluate.typographic.photographed import CLEAN
from ..engine.report.attack_charts import attack_chart, ranking_chart
from ..engine.report.charts import against_baseline
from ..engine.report.tables import table
from . import host
from .evaluation import evaluation_inputs, evaluation_outputs, feature_cache, measure
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
        results, display = measure(
            cls,
            lambda model, **host_calls: eval_typographic(model, dataset, seed=seed, **host_calls),
            full_clip,
            baseline,
        )
        model, before = results["model"], results.get("baseline")
        sentence = against_baseline(
            "Accuracy under attack", model.accuracy_under_attack, before and before.accuracy_under_attack
        )
        display.say(sentence)
        sheet, heading = sheet_of(dataset, model, before), sheet_heading(before is not None)
        chart = host.image_tensor(attack_chart(_groups(results), sheet, title=sentence, heading=f"{heading}:"))
        return io.NodeOutput(model.accuracy_under_attack, _table(results), chart, ui=ui.PreviewImage(chart, cls=cls))


def _groups(results):
    """{what is measured: {model: share}}, as bars."""
    groups: dict[str, dict[str, float]] = {}
    for name, found in results.items():
        for kind, shares in found.kinds.items():
            groups.setdefault(f"right, {kind}", {})[name] = shares.accuracy
        groups.setdefault("the word wins", {})[name] = found.word_wins
    return groups


def _table(results):
    kinds = next(iter(results.values())).kinds
    measures = {
        "right": lambda shares: percent(shares.accuracy),
        "the written word wins": lambda shares: percent(shares.word_wins),
        "object over its word": lambda shares: percent(shares.object_over_word),
    }
    rows = [
        {"pictures": f"{kind} ({kinds[kind].images}): {measure}"}
        | {name: tell(found.kinds[kind]) for name, found in results.items()}
        for kind in kinds
        for measure, tell in measures.items()
        if kind != CLEAN or measure != "the written word wins"
    ]
    return table(rows)


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
        mine = found["model"]
        order = mine.order
        more = [f"{len(image)} images came; the first is ranked."] if len(image) > 1 else []
        for note in (*notes_of(mine, found.get("baseline")), *more):
            display.say(note)
        first = mine.texts[order[0]]
        sentence = f"Nearest: “{first}” ({percent(mine.shares[order[0]])})"
        if "baseline" in found:
            other = found["baseline"]
            sentence += f"; the baseline finds “{other.texts[other.order[0]]}”"
        display.say(f"{sentence}.")
        chart = host.image_tensor(
            ranking_chart(
                picture,
                [mine.texts[place] for place in order],
                {name: [ranking.shares[place] for place in order] for name, ranking in found.items()},
                {name: [ranking.cosines[place] for place in order] for name, ranking in found.items()},
            )
        )
        return io.NodeOutput(chart, _ranking_table(found, order), ui=ui.PreviewImage(chart, cls=cls))


def _pil(array):
    return Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0])


def _ranking_table(found, order):
    return table(
        [
            {"text": found["model"].texts[place]}
            | {
                f"{name} {what}": value
                for name, ranking in found.items()
                for what, value in (
                    ("share", percent(ranking.shares[place])),
                    ("cosine", f"{ranking.cosines[place]:.4f}"),
                )
            }
            for place in order
        ]
    )


NODES = [EvalTypographic, RankCaptions]
