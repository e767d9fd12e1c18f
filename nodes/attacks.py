"""Nodes that show what a model sees in single images: with words written on them, and beside some texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from comfy_api.latest import io, ui

from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.evaluate.ranking import Ranking, rank_captions
from ..engine.evaluate.suite import notes_of, percent
from ..engine.evaluate.typographic.attack import Shares, TypographicResult, eval_typographic, sheet_heading, sheet_of
from ..engine.evaluate.typographic.photographed import CLEAN
from ..engine.report.attack_charts import attack_chart, ranking_chart
from ..engine.report.charts import against_baseline
from ..engine.report.tables import table
from .evaluation import evaluate_models, evaluation_output, evaluation_schema, feature_cache
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
        display = Display(cls)
        evaluate = functools.partial(eval_typographic, dataset=dataset, seed=seed)
        results = evaluate_models(display, evaluate, full_clip, baseline)
        model, before = results["model"], results.get("baseline")
        accuracy_before = None if before is None else before.accuracy_under_attack
        sentence = against_baseline("Accuracy under attack", model.accuracy_under_attack, accuracy_before)
        display.note(sentence)
        sheet = sheet_of(dataset, model, before)
        chart = attack_chart(_bars(results), sheet, title=sentence, heading=f"{sheet_heading(before is not None)}:")
        return evaluation_output(cls, model.accuracy_under_attack, _attack_rows(results), chart)


def _bars(results: Mapping[str, TypographicResult]) -> dict[str, dict[str, float]]:
    bars: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        for kind, shares in result.kinds.items():
            bars.setdefault(f"right, {kind}", {})[name] = shares.accuracy
        bars.setdefault("the word wins", {})[name] = result.word_wins
    return bars


_ATTACK_MEASURES: dict[str, Callable[[Shares], float | None]] = {
    "right": lambda shares: shares.accuracy,
    "the written word wins": lambda shares: shares.word_wins,
    "object over its word": lambda shares: shares.object_over_word,
}


def _attack_rows(results: Mapping[str, TypographicResult]) -> list[dict[str, str]]:
    return [
        {"images": f"{kind} ({shares.images}): {name}"}
        | {model: percent(measure(result.kinds[kind])) for model, result in results.items()}
        for kind, shares in results["model"].kinds.items()
        for name, measure in _ATTACK_MEASURES.items()
        if kind != CLEAN or name != "the written word wins"
    ]


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
            for name, model in models.items():
                check_cancelled()
                rankings[name] = rank_captions(
                    model, pil_image, texts.splitlines(), device=torch_device(), features=feature_cache()
                )
        if len(image) > 1:
            display.note(f"The batch has {len(image)} images; the first is ranked.")
        display.notes(notes_of(rankings["model"], rankings.get("baseline")))
        display.note(_ranking_sentence(rankings))
        order = rankings["model"].order
        chart = to_tensor(
            ranking_chart(
                pil_image,
                [rankings["model"].texts[index] for index in order],
                {name: [ranking.shares[index] for index in order] for name, ranking in rankings.items()},
                {name: [ranking.cosines[index] for index in order] for name, ranking in rankings.items()},
            )
        )
        return io.NodeOutput(chart, table(_ranking_rows(rankings)), ui=ui.PreviewImage(chart, cls=cls))


def _ranking_sentence(rankings: Mapping[str, Ranking]) -> str:
    model, baseline = rankings["model"], rankings.get("baseline")
    best = model.order[0]
    sentence = f"Nearest: “{model.texts[best]}” ({percent(model.shares[best])})"
    if baseline is None:
        return f"{sentence}."
    return f"{sentence}; the baseline says “{baseline.texts[baseline.order[0]]}”."


def _ranking_rows(rankings: Mapping[str, Ranking]) -> list[dict[str, str]]:
    rows = []
    for index in rankings["model"].order:
        row = {"text": rankings["model"].texts[index]}
        for name, ranking in rankings.items():
            row[f"{name} share"] = percent(ranking.shares[index])
            row[f"{name} cosine"] = f"{ranking.cosines[index]:.4f}"
        rows.append(row)
    return rows


NODES = [EvalTypographic, RankCaptions]
