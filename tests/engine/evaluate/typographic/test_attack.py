"""Typographic attacks, drawn and photographed, against counts made apart."""

import dataclasses
import json

import numpy
import pytest
import torch
from clips import random_clip
from image_folders import class_folder, labels_folder, load_image, scam_folder
from PIL import Image
from torch.nn import functional as F

from clip_finetune.engine import (
    UserError,
    build_network,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
)
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.evaluate import encoder
from clip_finetune.engine.evaluate.suite import Candidate, Request, evaluate
from clip_finetune.engine.evaluate.typographic.examples import attacked_image, fooled_apart
from clip_finetune.engine.evaluate.typographic.photographed import (
    CLEAN,
    HAND_WRITTEN,
    SYNTHETIC,
    load_attacks,
)
from clip_finetune.engine.report.tables import percent


def features_of(model, pictures, texts, template="{}"):
    """Unit features by open_clip's own calls."""
    network, tokenizer = build_network(model).eval(), Tokenizer(77)
    with torch.no_grad():
        images = F.normalize(network.encode_image(normalize(torch.stack(pictures))), dim=1)
        return images.double(), F.normalize(network.encode_text(tokenizer(texts)), dim=1).double()


def drawn_reference(model, data, result, seed):
    """The accuracies of the images as they were drawn, computed apart."""
    import open_clip

    pictures = [numpy.array(attacked_image(data, found, result)) for found in result.attacked]
    pictures = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    network, tokenizer = build_network(model).eval(), Tokenizer(77)
    classifier = open_clip.build_zero_shot_classifier(
        network, lambda texts: tokenizer(texts), list(data.class_names), open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    with torch.no_grad():
        answers = (F.normalize(network.encode_image(normalize(torch.stack(pictures))), dim=1) @ classifier).argmax(1)
    names = [data.class_names[answer] for answer in answers.tolist()]
    right = [name == found.shows for name, found in zip(names, result.attacked, strict=True)]
    won = [name == found.word for name, found in zip(names, result.attacked, strict=True)]
    return sum(right) / len(right), sum(won) / len(won)


def test_accuracy_under_attack_is_that_of_the_images_as_they_are_shown(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes", per_class=8))
    result = eval_typographic(model, data, seed=5)
    expected = drawn_reference(model, data, result, 5)
    assert (result.accuracy_under_attack, result.word_wins) == pytest.approx(expected, abs=1e-6)
    assert all(found.word != found.shows and found.kind == "drawn" for found in result.attacked)
    assert result.as_dict().keys() >= {"accuracy_clean", "accuracy_under_attack", "word_wins"}


def test_every_model_sees_the_same_words_whatever_the_order_the_batch_or_the_copies(model, tmp_path, monkeypatch):
    folder = class_folder(tmp_path / "classes", per_class=4)
    data = load_dataset(folder)
    mine, others = (eval_typographic(one, data, seed=1) for one in (model, random_clip(seed=9)))
    assert [(found.name, found.word) for found in mine.attacked] == [
        (found.name, found.word) for found in others.attacked
    ]
    assert [found.word for found in eval_typographic(model, data, seed=2).attacked] != [w.word for w in mine.attacked]
    monkeypatch.setattr(encoder, "BATCH", 3)
    turned = eval_typographic(model, data.subset(list(reversed(range(len(data))))), seed=1)
    assert turned.as_dict() == mine.as_dict()
    # Copies, which come before or behind what they copy, count once.
    for name in ("a copy.png", "z copy.png"):
        (folder / "red" / name).write_bytes((folder / "red/0.png").read_bytes())
    doubled = eval_typographic(model, load_dataset(folder), seed=1)
    assert doubled.images == mine.images == 16


def test_an_attack_needs_two_classes_whose_names_can_be_drawn(model, tmp_path):
    with pytest.raises(UserError, match="has no classes"):
        eval_typographic(model, load_dataset(labels_folder(tmp_path / "captions")))
    for name in ("犬", "猫"):
        (tmp_path / "cjk" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red" if name == "犬" else "blue").save(tmp_path / "cjk" / name / "1.png")
    with pytest.raises(UserError, match="No font here has the letters"):
        eval_typographic(model, load_dataset(tmp_path / "cjk"))


def test_images_that_fool_one_model_only_are_picked_evenly_from_both_sides(model, tmp_path):
    result = eval_typographic(model, load_dataset(class_folder(tmp_path / "classes", per_class=8)))

    def fooled(*numbers):
        pictures = tuple(
            dataclasses.replace(found, fooled=number in numbers) for number, found in enumerate(result.attacked)
        )
        return dataclasses.replace(result, attacked=pictures)

    def places(pairs):
        return [mine.index for mine, _ in pairs]

    index = [found.index for found in result.attacked]
    assert places(fooled_apart(fooled(1, 2), fooled(2, 5))) == [index[5], index[1]]
    assert places(fooled_apart(fooled(*range(10)), fooled())) == [index[n * 10 // 8] for n in range(8)]
    assert len(fooled_apart(fooled(*range(16)), fooled(*range(16, 32)))) == 8
    assert fooled_apart(fooled(), fooled()) == []
    assert places(fooled_apart(fooled(3), None)) == [index[3]]


def test_real_attacks_are_counted_as_by_hand(model, tmp_path):
    data = load_attacks(scam_folder(tmp_path / "scam"))
    found = eval_typographic(model, data, templates="none")
    names = sorted({f"object {n}" for n in range(3)} | {f"word {n}" for n in range(6)})
    pictures, texts = features_of(model, [load_image(data.path(n), 32) for n in range(18)], names)
    scores = pictures @ texts.T
    for start, kind in ((0, CLEAN), (6, HAND_WRITTEN), (12, SYNTHETIC)):
        rows = scores[start : start + 6]
        objects = torch.tensor([names.index(f"object {n % 3}") for n in range(6)])
        words = torch.tensor([names.index(f"word {n}") for n in range(6)])
        shares = found.kinds[kind]
        assert shares.images == 6
        assert shares.accuracy == pytest.approx((rows.argmax(1) == objects).double().mean().item(), abs=1e-6)
        assert shares.word_wins == pytest.approx((rows.argmax(1) == words).double().mean().item(), abs=1e-6)
        over = rows.gather(1, objects[:, None]) > rows.gather(1, words[:, None])
        assert shares.object_over_word == pytest.approx(over.double().mean().item(), abs=1e-6)
    assert found.images == 12 and found.accuracy_clean == found.kinds[CLEAN].accuracy
    attacked = (found.kinds[HAND_WRITTEN].accuracy + found.kinds[SYNTHETIC].accuracy) / 2
    assert found.accuracy_under_attack == pytest.approx(attacked)
    assert (
        eval_typographic(model, data.subset(list(reversed(range(18)))), templates="none").as_dict() == found.as_dict()
    )


def test_without_attacked_images_there_is_no_accuracy_and_without_words_no_share(model, tmp_path):
    folder = scam_folder(tmp_path / "scam")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[:6]:
        row["attack_word"] = ""
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = eval_typographic(model, load_attacks(folder))
    assert found.kinds[CLEAN].object_over_word is None and found.kinds[SYNTHETIC].object_over_word is not None
    assert found.as_dict()["kinds"][CLEAN]["object_over_word"] is None and percent(None) == "-"
    for row in rows[6:]:
        (folder / row["file_name"]).unlink()
    for measure in (
        lambda: eval_typographic(model, load_attacks(folder)),
        lambda: evaluate([Candidate("model", None, model)], load_attacks(folder), Request(typographic=True)),
    ):
        with pytest.raises(UserError, match="None of the images of scam that have words on them can be opened; put"):
            measure()


def test_an_image_that_is_in_all_classes_leaves_no_word_to_write(model, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "same" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "same" / name / "1.png")
    with pytest.raises(UserError, match="same belong to all of its classes at once.*put different images"):
        eval_typographic(model, load_dataset(tmp_path / "same"))


def test_an_attack_is_the_same_for_the_same_seed_and_counts_add_up(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes", per_class=8))
    first, again = (eval_typographic(model, data, seed=3) for _ in range(2))
    assert first == again and first.images == 32
    assert first.accuracy_clean == eval_zero_shot(model, data, templates="simple").top1
    assert 0 <= first.accuracy_under_attack + first.word_wins <= 1
