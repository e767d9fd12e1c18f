"""Zero-shot accuracy against open_clip, scikit-learn and the published script."""

import json
import shutil

import numpy
import pytest
import torch
from clips import random_clip
from image_folders import COLOURS, class_folder, labels_folder, load_image
from PIL import Image
from torch.nn import functional as F

from clip_finetune.engine import (
    TrainConfig,
    UserError,
    build_network,
    eval_retrieval,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
    load_full_clip,
    train,
)
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate import zero_shot
from clip_finetune.engine.evaluate.encoder import Encoder
from clip_finetune.engine.evaluate.intervals import bootstrap_interval, difference_interval
from clip_finetune.engine.evaluate.suite import Candidate, Request, evaluate, rows_of
from clip_finetune.engine.evaluate.zero_shot import in_batch_share, ranks_of, zero_shot_of
from clip_finetune.engine.report.tables import table


@pytest.mark.parametrize("templates", ["openai-80", "simple", "none"])
def test_zero_shot_accuracy_is_that_of_open_clips_classifier(model, tmp_path, templates):
    import open_clip

    data = load_dataset(class_folder(tmp_path / "classes", per_class=6))
    network = build_network(model).eval()
    theirs = {
        "openai-80": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "none": (lambda name: name,),
    }[templates]
    tokenizer = Tokenizer(77)
    classifier = open_clip.build_zero_shot_classifier(
        network, lambda texts: tokenizer(texts), list(data.class_names), theirs, num_classes_per_batch=2
    )
    pictures = torch.stack([load_image(data.path(index), 32) for index in range(len(data))])
    with torch.no_grad():
        scores = F.normalize(network.encode_image(normalize(pictures)), dim=1) @ classifier
    labels = torch.tensor(data.labels)
    right = scores.argmax(1) == labels
    found = eval_zero_shot(model, data, templates=templates)
    assert found.top1 == pytest.approx(right.double().mean().item(), abs=1e-6)
    assert found.top5 == 1.0 and found.images == 24 and found.classes == 4
    from sklearn.metrics import balanced_accuracy_score

    expected = balanced_accuracy_score(labels.numpy(), scores.argmax(1).numpy())
    assert found.mean_per_class == pytest.approx(expected, abs=1e-6)


def test_class_features_are_those_of_open_clip_to_the_last_digits(model):
    import open_clip

    names, tokenizer = ["red", "great white shark", "dog"], Tokenizer(77)
    for templates in ("openai-80", "simple", "none"):
        sentences = zero_shot.sentences_of(templates)
        found = zero_shot.class_features(Encoder.of(model), names, sentences)
        theirs = open_clip.build_zero_shot_classifier(build_network(model).eval(), tokenizer, names, sentences)
        torch.testing.assert_close(found, theirs.T, rtol=0, atol=1e-6)


def test_a_tie_between_classes_is_not_a_win():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.4, 0.3]], dtype=torch.float64)
    right = torch.tensor([[True, False, False], [False, False, True]])
    assert ranks_of(scores, right).tolist() == [2, 3]


def test_mistakes_are_counted_by_class_and_answer(model, tmp_path, monkeypatch):
    data = load_dataset(class_folder(tmp_path / "classes", per_class=6))
    found = eval_zero_shot(model, data, templates="simple")
    wrong = sum(count for *_, count in found.confused)
    assert wrong == round(24 * (1 - found.top1)) and found.per_class_images == dict.fromkeys(sorted(COLOURS), 6)
    assert all(one != other for one, other, _ in found.confused)
    assert [count for *_, count in found.confused] == sorted((count for *_, count in found.confused), reverse=True)
    details = found.details()
    assert details["per_class"][0] == {"class": "blue", "images": 6, "top1": found.per_class["blue"]}
    assert json.loads(json.dumps(details)) == details and "published_in_batch_share" not in details
    # In whatever blocks, batches and order.
    monkeypatch.setattr(zero_shot, "ROWS", 5)
    monkeypatch.setattr(zero_shot, "_SENTENCES_AT_ONCE", 20)
    monkeypatch.setattr(encoder_module, "BATCH", 7)
    turned = eval_zero_shot(model, data.subset(list(reversed(range(24)))), templates="simple")
    assert turned.details() == details and turned.as_dict() == found.as_dict()


def test_an_image_in_two_classes_is_one_image_that_is_right_with_either(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=2)
    shutil.copy(folder / "red/0.png", folder / "blue/again.png")
    found = eval_zero_shot(model, load_dataset(folder), templates="none")
    assert found.images == 8 and found.per_class_images == {"blue": 3, "green": 2, "red": 2, "yellow": 2}


def test_a_table_with_several_rows_per_image_counts_each_image_once(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=2)
    rows = [f"{name}/{n}.png,{name}" for name in COLOURS for n in range(2)]
    table = "\n".join(["image,label", *rows, *rows, rows[0].replace(",red", ",blue")])
    (folder / "human_responses.csv").write_text(table)
    data = load_dataset(folder, "labels")
    found, plain = eval_zero_shot(model, data), eval_zero_shot(model, load_dataset(folder, "folders"))
    assert data.format == "labels" and found.images == 8 and found.as_dict() == plain.as_dict()


def test_a_bootstrap_interval_is_that_of_drawing_with_replacement():
    values = torch.tensor([1.0] * 37 + [0.0] * 63)
    low, high = bootstrap_interval(values)
    drawn = numpy.random.default_rng(7).choice(values.numpy(), size=(20_000, 100)).mean(1)
    assert (low, high) == pytest.approx(numpy.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.011)
    assert bootstrap_interval(values.flip(0)) == (low, high) and low < 0.37 < high
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_the_interval_of_a_difference_is_that_of_pairs():
    """Two models that are right on the same images but one differ surely, however wide their own intervals are."""
    baseline = torch.tensor([1.0, 0.0] * 200)
    model = baseline.clone()
    model[1:60:2] = 1.0
    low, high = difference_interval(model, baseline)
    assert 0.045 < low < 30 / 400 < high < 0.11
    assert difference_interval(baseline, baseline) == (0.0, 0.0)


def test_the_published_figure_is_that_of_batches_of_48(model, tmp_path):
    """Counted as the published script counts: products of features, a softmax, and strings that are compared."""
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(100, 8, generator=chance).double()
    texts = torch.randn(5, 8, generator=chance).double() * torch.tensor([[1.0], [3.0], [1.0], [1.0], [0.2]])
    labels = torch.randint(5, (100,), generator=chance).tolist()
    found = in_batch_share(images, texts, labels, seed=4)
    import random

    shuffles, right = random.Random(4), 0
    for _ in range(10):
        order = shuffles.sample(range(100), 100)
        for start in range(0, 100, 48):
            rows = order[start : start + 48]
            words = [f"class {labels[row]}" for row in rows]
            shares = (images[rows] @ texts[[labels[row] for row in rows]].T).softmax(-1)
            for row, best in enumerate(shares.topk(1, dim=-1).indices):
                right += words[row] == words[best]
    assert found == right / 1000
    # It is another number than the accuracy, whose texts have no lengths.
    unit_texts = F.normalize(texts, dim=1)
    assert in_batch_share(images, unit_texts, labels) != found
    data = load_dataset(class_folder(tmp_path / "classes", per_class=6))
    result = eval_zero_shot(model, data, protocol="published")
    assert 0 <= result.in_batch <= 1 and result.details()["published_in_batch_share"] == result.in_batch
    assert result.as_dict() == eval_zero_shot(model, data).as_dict() and eval_zero_shot(model, data).in_batch is None
    turned = eval_zero_shot(model, data.subset(list(reversed(range(24)))), protocol="published")
    assert turned.in_batch == result.in_batch
    assert "not an accuracy" in table(
        rows_of(evaluate([Candidate("model", None, model)], data, Request(protocol="published")))
    )
    with pytest.raises(UserError, match="protocol is 'other'; choose whole set or published"):
        eval_zero_shot(model, data, protocol="other")


def test_the_published_figure_uses_bare_names_and_ignores_order(model, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(zero_shot, "in_batch_share", lambda *arguments: given.append(arguments) or 0.5)
    data = load_dataset(class_folder(tmp_path / "classes"))
    for order in (range(12), reversed(range(12))):
        eval_zero_shot(model, data.subset(list(order)), protocol="published")
    with torch.no_grad():
        expected = build_network(model).eval().encode_text(Tokenizer(77)(list(data.class_names)))
    for pictures, texts, labels in given:
        torch.testing.assert_close(texts, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pictures, given[0][0], rtol=0, atol=1e-6)
        assert labels == sorted(labels) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a model that has learnt to tell noisy colours apart, 400 images of which it knows most)."""
    top = tmp_path_factory.mktemp("trained")
    noise = numpy.random.default_rng(0)
    for part, count in (("train", 24), ("test", 100)):
        for name, colour in COLOURS.items():
            (top / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = numpy.array(colour) + noise.normal(0, 60, (32, 32, 3)) + noise.normal(0, 30, 3)
                file = top / part / name / f"{number}.png"
                Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(file)
    config = TrainConfig.from_flat(epochs=10, batch_size=16, learning_rate=1e-3, precision="fp32")
    trained = train(random_clip(), load_dataset(top / "train"), None, config, run_folder=top / "run")
    return load_full_clip(trained.run_folder / "best.safetensors"), load_dataset(top / "test")


def test_a_trained_models_accuracies_are_those_of_open_clip_and_scikit_learn(trained):
    import open_clip
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    model, data = trained
    kept = data.subset(
        [index for index in range(400) if data.labels[index] or index % 5 == 0]
    )  # classes of unequal size
    network, names = build_network(model).eval(), list(data.class_names)
    classifier = open_clip.build_zero_shot_classifier(
        network, Tokenizer(77), names, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    pictures = torch.stack([load_image(kept.path(index), 32) for index in range(len(kept))])
    with torch.no_grad():
        answers = (F.normalize(network.encode_image(normalize(pictures)), dim=1) @ classifier).argmax(1).tolist()
    found = eval_zero_shot(model, kept, templates="simple")
    right = [answer == label for answer, label in zip(answers, kept.labels, strict=True)]
    assert 0.6 < found.top1 < 1 and found.top1 == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert found.mean_per_class == pytest.approx(balanced_accuracy_score(kept.labels, answers), abs=1e-6)
    assert found.mean_per_class != found.top1
    matrix = confusion_matrix(kept.labels, answers)
    counted = {(names[row], names[column]): matrix[row, column] for row in range(4) for column in range(4)}
    assert {(one, other): count for one, other, count in found.confused} == {
        pair: count for pair, count in counted.items() if count and pair[0] != pair[1]
    }


def test_bf16_measures_as_fp32_does(trained):
    model, data = trained
    exact = zero_shot_of(Encoder.of(model), data, templates="simple")
    assert exact.images == 400 and 0.5 < exact.top1
    half = zero_shot_of(Encoder.of(model, precision="bf16"), data, templates="simple")
    rounded = model.derive({name: w.bfloat16() for name, w in model.state_dict.items()}, step="bf16")
    stored = eval_zero_shot(rounded, data, templates="simple")
    for found in (half, stored):
        assert abs(found.top1 - exact.top1) <= 0.002 and abs(found.mean_per_class - exact.mean_per_class) <= 0.002


def test_custom_templates_are_used_and_checked(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    own = eval_zero_shot(model, data, templates="custom", custom_templates=["{}"])
    assert own.per_class == eval_zero_shot(model, data, templates="none").per_class
    for lines in ([], ["a photo"]):
        with pytest.raises(UserError, match="custom template"):
            eval_zero_shot(model, data, templates="custom", custom_templates=lines)


def test_an_empty_validation_split_is_refused_with_a_way_out(model, tmp_path):
    for folder, measure in ((labels_folder, eval_retrieval), (class_folder, eval_zero_shot)):
        data = load_dataset(folder(tmp_path / folder.__name__)).subset([])
        with pytest.raises(UserError, match="set validation_split above 0"):
            measure(model, data)


def test_one_class_is_refused(model, tmp_path):
    shutil.copytree(class_folder(tmp_path / "classes") / "red", tmp_path / "one/red")
    with pytest.raises(UserError, match="a single class"):
        eval_zero_shot(model, load_dataset(tmp_path / "one"))


def test_a_model_of_nan_is_refused_and_never_wins(tmp_path):
    from clip_finetune.engine.evaluate.encoder import BrokenModel

    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    captioned, classes = load_dataset(labels_folder(tmp_path / "a")), load_dataset(class_folder(tmp_path / "b"))
    for measure, data in ((eval_retrieval, captioned), (eval_zero_shot, classes), (eval_typographic, classes)):
        with pytest.raises(BrokenModel, match="not numbers"):
            measure(broken, data)
