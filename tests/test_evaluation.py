"""Evaluation against definitions and code that nobody here wrote, and against cases counted by hand."""

import shutil

import pytest
import torch
from clips import random_clip
from pictures import class_folder, labels_folder
from torch.nn import functional as F

from clip_finetune.engine import (
    UserError,
    build_network,
    eval_retrieval,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
    to_gmp,
)
from clip_finetune.engine.data.images import load_image, normalize
from clip_finetune.engine.data.tokens import Tokenizer
from clip_finetune.engine.evaluate import features
from clip_finetune.engine.evaluate.retrieval import contrastive_loss, retrieval_metrics
from clip_finetune.engine.evaluate.zero_shot import ranks_of
from clip_finetune.engine.report.charts import against_baseline, bar_chart, loss_chart
from clip_finetune.engine.report.tables import table, time_words


@pytest.fixture(scope="module")
def model():
    return random_clip()


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


# ---- retrieval -------------------------------------------------------------------------------------------------------


def recall_as_clip_benchmark_defines_it(scores, positive, k):
    """A query counts if any of its positives is among its k best."""
    best = scores.topk(k, dim=1).indices
    return positive.gather(1, best).any(1).double().mean().item()


def test_recall_is_clip_benchmarks_with_several_captions_a_picture():
    images, texts = unit(40, 16), unit(200, 16, seed=1)
    relevant = [list(range(5 * image, 5 * image + 5)) for image in range(40)]
    positive = torch.zeros(40, 200, dtype=torch.bool)
    for image, columns in enumerate(relevant):
        positive[image, columns] = True
    to_text, to_image = retrieval_metrics(images, texts, relevant)
    scores = images @ texts.T
    for k in (1, 5, 10):
        assert to_text[f"r{k}"] == pytest.approx(recall_as_clip_benchmark_defines_it(scores, positive, k), abs=1e-6)
        assert to_image[f"r{k}"] == pytest.approx(
            recall_as_clip_benchmark_defines_it(scores.T, positive.T, k), abs=1e-6
        )


def test_a_tie_is_not_a_win_and_median_ranks_are_counted():
    images = torch.eye(3, dtype=torch.float64)
    texts = torch.stack([images[0], images[0], images[2]])
    to_text, to_image = retrieval_metrics(images, texts, [[0], [1], [2]])
    # Picture 0 ties with text 1, picture 1 has 0 for all three; text 0 and 1 both find picture 0.
    assert to_text["r1"] == pytest.approx(1 / 3) and to_text["median_rank"] == 2
    assert to_image["r1"] == pytest.approx(2 / 3)


def test_the_loss_of_the_whole_set_is_open_clips():
    import open_clip

    images, texts = unit(50, 16), unit(50, 16, seed=1)
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(30.0, dtype=torch.float64)).item()
    assert contrastive_loss(images, texts, [[n] for n in range(50)], 30.0) == pytest.approx(theirs, rel=1e-12)


def test_retrieval_does_not_depend_on_order_or_batches_and_a_copy_counts_once(model, tmp_path, monkeypatch):
    data = load_dataset(labels_folder(tmp_path / "a", 12))
    first = eval_retrieval(model, data)
    assert first.images == 12 and first.captions == 24
    monkeypatch.setattr(features, "BATCH", 5)
    turned = eval_retrieval(model, data.subset(list(reversed(range(12)))))
    assert turned.as_dict() == first.as_dict() and turned.loss == pytest.approx(first.loss, rel=1e-5)
    shutil.copy(tmp_path / "a/000.png", tmp_path / "a/copy.png")
    labels = (tmp_path / "a/labels.json").read_text()
    (tmp_path / "a/labels.json").write_text(labels[:-1] + ', "copy.png": ["red number 0 said in way 0"]}')
    doubled = eval_retrieval(model, load_dataset(tmp_path / "a"))
    assert doubled.images == 12 and doubled.as_dict() == first.as_dict()


def test_a_gmp_model_measures_as_its_plain_form(model, tmp_path):
    data = load_dataset(labels_folder(tmp_path / "a", 12))
    assert eval_retrieval(to_gmp(model), data).as_dict() == eval_retrieval(model, data).as_dict()


def test_retrieval_of_class_folders_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="no captions"):
        eval_retrieval(model, load_dataset(class_folder(tmp_path / "classes")))


# ---- zero-shot -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", ["openai-80", "simple", "none"])
def test_zero_shot_accuracy_is_that_of_open_clips_classifier(model, tmp_path, templates):
    import open_clip

    data = load_dataset(class_folder(tmp_path / "classes", per_class=6))
    network = build_network(model).eval()
    theirs = {"openai-80": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
              "none": (lambda name: name,)}[templates]  # fmt: skip
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


def test_classes_of_equal_score_are_not_won():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.4, 0.3]], dtype=torch.float64)
    right = torch.tensor([[True, False, False], [False, False, True]])
    assert ranks_of(scores, right).tolist() == [2, 3]


def test_custom_templates_are_used_and_checked(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    own = eval_zero_shot(model, data, templates="custom", custom_templates=["{}"])
    assert own.per_class == eval_zero_shot(model, data, templates="none").per_class
    for lines in ([], ["a photo"]):
        with pytest.raises(UserError, match="custom template"):
            eval_zero_shot(model, data, templates="custom", custom_templates=lines)


def test_an_empty_validation_part_is_told(model, tmp_path):
    for folder, evaluate in ((labels_folder, eval_retrieval), (class_folder, eval_zero_shot)):
        data = load_dataset(folder(tmp_path / folder.__name__)).subset([])
        with pytest.raises(UserError, match="set validation_split above 0"):
            evaluate(model, data)


def test_one_class_is_refused(model, tmp_path):
    shutil.copytree(class_folder(tmp_path / "classes") / "red", tmp_path / "one/red")
    with pytest.raises(UserError, match="a single class"):
        eval_zero_shot(model, load_dataset(tmp_path / "one"))


# ---- typographic attack ----------------------------------------------------------------------------------------------


def test_an_attack_is_the_same_for_the_same_seed_and_counts_add_up(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes", per_class=8))
    first, again = (eval_typographic(model, data, seed=3) for _ in range(2))
    assert first == again and first.images == 32
    assert first.accuracy_clean == eval_zero_shot(model, data, templates="simple").top1
    assert 0 <= first.accuracy_under_attack + first.word_wins <= 1


# ---- charts and tables -----------------------------------------------------------------------------------------------


def test_charts_are_drawn_from_any_numbers_and_never_have_an_alpha_channel():
    step = {"kind": "step", "step": 1, "loss": 1.0, "learning_rate": {"all": 1e-6}}
    for steps in ([], [step], [step] * 3, [step | {"step": n, "loss": float("nan")} for n in range(4)]):
        for validations in ([], [{"step": 0, "loss": 2.0}]):
            assert loss_chart(steps, validations).mode == "RGB"
    assert (
        bar_chart({}).mode == bar_chart({"a": {"x": 0.0}}).mode == bar_chart({"a": {"x": 1.0, "y": 0.5}}).mode == "RGB"
    )


def test_a_chart_shows_more_when_there_is_more():
    lines = [{"step": n, "loss": 5 / n, "learning_rate": {"all": 1e-6}} for n in range(1, 30)]
    assert loss_chart(lines[:10], []).tobytes() != loss_chart(lines, []).tobytes()


def test_a_sentence_tells_better_from_worse():
    assert against_baseline("Accuracy", 0.5, None) == "Accuracy: 50.0%"
    assert against_baseline("Accuracy", 0.5, 0.4) == "Accuracy: 50.0%, 10.0 points better than the baseline"
    assert against_baseline("Accuracy", 0.3, 0.4) == "Accuracy: 30.0%, 10.0 points worse than the baseline"
    assert against_baseline("Accuracy", 0.4, 0.4) == "Accuracy: 40.0%, as before"


def test_times_are_told_as_one_says_them():
    assert [time_words(seconds) for seconds in (None, 0.4, 89, 91, 3599, 3600, 12_000)] == [
        "?", "0 s", "89 s", "2 min", "1 h 0 min", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip


def test_a_table_is_aligned():
    assert table([{"model": "a", "x": "1"}, {"model": "bb", "y": "22"}]).splitlines() == [
        "model  x   y",
        "-----  -  --",
        "a      1",
        "bb        22",
    ]


def test_a_model_of_nan_is_refused_and_never_wins(tmp_path):
    from clip_finetune.engine.evaluate.features import BrokenModel

    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    captioned, classes = load_dataset(labels_folder(tmp_path / "a")), load_dataset(class_folder(tmp_path / "b"))
    for measure, data in ((eval_retrieval, captioned), (eval_zero_shot, classes), (eval_typographic, classes)):
        with pytest.raises(BrokenModel, match="not numbers"):
            measure(broken, data)
