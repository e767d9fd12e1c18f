"""Nodes that show what a model sees in single images: with words written on them, and beside some texts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy_api.latest import io, ui

from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.evaluate import suite
from ..engine.evaluate.comparison import notes_of
from ..engine.evaluate.ranking import Ranking, rank_captions, rankings_chart, rankings_table
from ..engine.report.tables import percent
from .evaluation import evaluate, evaluation_schema, feature_cache
from .host.device import check_cancelled, exclusive_device, torch_device
from .host.display import Display, to_pil, to_tensor
from .schema import baseline_input, node_schema, seed_input
from .sockets import FullClip


class EvalTypographic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return evaluation_schema(
            "EvalTypographic",
            "Evaluate Typographic Attack",
            "Measures how many images of a labelled folder the model still recognises when the name of another class "
            "is written on them, and how often it believes the word. Also for photos of real handwritten attacks.",
            "scam, text on image, robustness",
            "accuracy_under_attack",
            seed_input("Decides which words are drawn, where, and in which fonts and colours."),
        )

    @classmethod
    def execute(
        cls, full_clip: FullCLIP, dataset: ClipDataset, baseline: FullCLIP | None = None, seed: int = 0
    ) -> io.NodeOutput:
        request = suite.Request(templates="simple", typographic=True, seed=seed)
        return evaluate(cls, suite.TYPOGRAPHIC, request, full_clip, dataset, baseline)


class RankCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "RankCaptions",
            "Rank Captions",
            "evaluate",
            "Shows what a model thinks of one image: which of your texts fits it best, beside what the baseline says.",
            aliases="zero-shot, classify image, compare captions, clip score, evaluate",
            inputs=[
                FullClip.Input("full_clip"),
                io.Image.Input("image", tooltip="Of a batch, the first image is used."),
                io.String.Input(
                    "texts", default="a photo of a cat\na photo of a dog", multiline=True, tooltip="One text per line."
                ),
                baseline_input(optional=True),
            ],
            outputs=dict(chart=io.Image, table=io.String),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, full_clip: FullCLIP, image: torch.Tensor, texts: str, baseline: FullCLIP | None = None
    ) -> io.NodeOutput:
        display, pil_image = Display(cls), to_pil(image[0])
        models = {"model": full_clip} if baseline is None else {"model": full_clip, "baseline": baseline}
        rankings: dict[str, Ranking] = {}
        with exclusive_device():
            for name, full_clip in models.items():
                check_cancelled()
                rankings[name] = rank_captions(
                    full_clip, pil_image, texts.splitlines(), device=torch_device(), features=feature_cache()
                )
        if len(image) > 1:
            display.note(f"The batch has {len(image)} images; the first is ranked.")
        before = rankings.get("baseline")
        display.notes(notes_of(rankings["model"].notes, None if before is None else before.notes))
        display.note(_ranking_sentence(rankings))
        chart = to_tensor(rankings_chart(pil_image, rankings))
        return io.NodeOutput(chart, rankings_table(rankings), ui=ui.PreviewImage(chart, cls=cls))


def _ranking_sentence(rankings: Mapping[str, Ranking]) -> str:
    model, baseline = rankings["model"], rankings.get("baseline")
    best = model.order[0]
    sentence = f"Nearest: “{model.texts[best]}” ({percent(model.shares[best])})"
    if baseline is None:
        return f"{sentence}."
    return f"{sentence}; the baseline says “{baseline.texts[baseline.order[0]]}”."


NODES = [EvalTypographic, RankCaptions]
