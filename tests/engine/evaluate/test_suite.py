"""Several models on one dataset."""

import dataclasses
import json
import shutil

import pytest
import torch
from clips import random_clip
from image_folders import SCAM, class_folder, labelled_and_captioned, labels_folder, scam_folder
from PIL import Image

from clip_finetune.engine import (
    UserError,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
    save_full_clip,
)
from clip_finetune.engine.cli import main
from clip_finetune.engine.evaluate import suite
from clip_finetune.engine.evaluate.suite import Candidate, Evaluator, Request, evaluate
from clip_finetune.engine.evaluate.typographic.photographed import (
    CLEAN,
    load_attacks,
)


def test_one_evaluation_encodes_each_image_once(model, tmp_path, passes):
    data = load_dataset(labelled_and_captioned(tmp_path / "both"))
    (result,) = evaluate([Candidate("model", None, model)], data, Request(templates="simple"))
    assert list(result.measured) == ["zero_shot", "retrieval"]
    assert passes == {"images": 12, "texts": 4 * 7 + 4}
    passes.update(images=0, texts=0)
    both = (Candidate("model", None, model), Candidate("baseline", None, random_clip(seed=4)))
    evaluate(both, data, Request(templates="none", typographic=True))
    assert passes["images"] == 2 * (12 + 12)  # clean, and with words
    for templates in ("openai-80", "none"):
        (result,) = evaluate(both[1:], data, Request(templates=templates, typographic=True))
        assert result.measured["typographic"].accuracy_clean == result.measured["zero_shot"].top1
        assert result.measured["typographic"] == eval_typographic(random_clip(seed=4), data, templates=templates)


def test_the_short_templates_are_the_default_only_for_words_written_on_the_images(model, tmp_path):
    drawn = load_dataset(class_folder(tmp_path / "drawn"))
    (found,) = evaluate([Candidate("model", None, model)], drawn, Request(typographic=True))
    assert found.measured["zero_shot"] == eval_zero_shot(model, drawn, templates="openai-80")
    assert found.measured["typographic"] == eval_typographic(model, drawn, templates="openai-80")
    (tmp_path / "real").mkdir()
    for number, file in enumerate(sorted((tmp_path / "drawn").rglob("*.png"))):
        shutil.copy(file, tmp_path / "real" / f"label={file.parent.name}_text={'dog' if number % 2 else 'cup'}.png")
    real = load_attacks(tmp_path / "real")
    for templates in (None, "none"):
        (found,) = evaluate([Candidate("model", None, model)], real, Request(typographic=True, templates=templates))
        expected = eval_typographic(model, real, templates=templates or "simple")
        assert found.measured == {"typographic": expected}


def test_a_broken_model_among_several_is_named(model, tmp_path):
    nothing = torch.full_like(model.state_dict["text_projection"], torch.nan)
    broken = model.derive({"text_projection": nothing}, step="broken")
    data = load_dataset(labels_folder(tmp_path / "colours", 4))
    with pytest.raises(UserError, match="broken.safetensors: The model computes values that are not numbers"):
        evaluate([Candidate("model", None, model), Candidate("model", "broken.safetensors", broken)], data)


@dataclasses.dataclass(frozen=True)
class Brightness:
    """The result of an evaluator that is not in the registry."""

    images: int
    share: float
    notes: tuple[str, ...] = ("Brightness was measured.",)

    def as_dict(self):
        return {"share": self.share}

    def rows(self):
        return {"bright images": f"{self.share:.1%}"}


def test_a_new_evaluator_is_one_record(model, tmp_path, monkeypatch):
    """The JSON, the table, the notes and the page have it without any other change."""
    record = Evaluator(
        name="brightness",
        title="Bright images",
        applies=lambda dataset, request: True,
        require=lambda dataset: None,
        run=lambda encoder, dataset, request, images: Brightness(len(images.samples), 0.25),
        score=lambda result: result.share,
        chart=lambda results, title: Image.new("RGB", (8, 8)),
    )
    monkeypatch.setattr(suite, "EVALUATORS", (*suite.EVALUATORS, record))
    data, notes = load_dataset(labels_folder(tmp_path / "colours", 4)), []
    results = evaluate([Candidate("model", "a.safetensors", model)], data, on_note=notes.append)
    assert results[0].as_dict()["brightness"] == {"share": 0.25} and results[0].as_dict()["images"] == 4
    assert suite.rows_of(results)[0]["bright images"] == "25.0%" and "Brightness was measured." in notes
    titles = [measurement.sentence for measurement in suite.measurements_of(data, results)]
    assert titles[-1] == "Bright images: 25.0%" and titles[0].startswith("Recall at 1: ")


def test_the_command_measures_attacks(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_full_clip(model, "tiny.safetensors")
    class_folder(tmp_path / "classes")
    scam_folder(tmp_path / "scam")
    arguments = ["eval", "--model", "tiny.safetensors", "--typographic", "--json", "n.json", "--templates", "simple"]
    for data in ("classes", "scam"):
        assert main([*arguments, "--data", data]) == 0
        (result,) = json.loads((tmp_path / "n.json").read_text())["models"]
        assert ("zero_shot" in result) == (data == "classes")
        assert set(result["typographic"]["kinds"]) == {"classes": {CLEAN, "drawn"}, "scam": set(SCAM.values())}[data]
        assert "word wins" in capsys.readouterr().out
