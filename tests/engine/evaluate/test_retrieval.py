"""Retrieval against CLIP_benchmark, open_clip and cases counted by hand."""

import json
import shutil

import pytest
import torch
from image_folders import class_folder, labels_folder
from PIL import Image
from torch.nn import functional as F

from clip_finetune.engine import (
    TrainConfig,
    UserError,
    combine_datasets,
    eval_retrieval,
    load_dataset,
    to_gmp,
    train,
)
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate import retrieval
from clip_finetune.engine.evaluate.retrieval import retrieval_numbers
from clip_finetune.engine.evaluate.suite import Candidate, Request, evaluate


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def recall_as_clip_benchmark_defines_it(scores, positive, k):
    """A query counts if any of its positives is among its k best."""
    best = scores.topk(k, dim=1).indices
    return positive.gather(1, best).any(1).double().mean().item()


def test_recall_is_clip_benchmarks_with_several_captions_per_image():
    images, texts = unit(40, 16), unit(200, 16, seed=1)
    relevant = [list(range(5 * image, 5 * image + 5)) for image in range(40)]
    positive = torch.zeros(40, 200, dtype=torch.bool)
    for image, columns in enumerate(relevant):
        positive[image, columns] = True
    to_text, to_image, _ = retrieval_numbers(images, texts, relevant, 1.0)
    scores = images @ texts.T
    for k in (1, 5, 10):
        assert getattr(to_text, f"r{k}") == pytest.approx(
            recall_as_clip_benchmark_defines_it(scores, positive, k), abs=1e-6
        )
        assert getattr(to_image, f"r{k}") == pytest.approx(
            recall_as_clip_benchmark_defines_it(scores.T, positive.T, k), abs=1e-6
        )


def test_a_tie_is_not_a_win_and_median_ranks_are_counted():
    images = torch.eye(3, dtype=torch.float64)
    texts = torch.stack([images[0], images[0], images[2]])
    to_text, to_image, _ = retrieval_numbers(images, texts, [[0], [1], [2]], 1.0)
    # Image 0 ties with text 1, image 1 has 0 for all three; text 0 and 1 both find image 0.
    assert to_text.r1 == pytest.approx(1 / 3) and to_text.median_rank == 2
    assert to_image.r1 == pytest.approx(2 / 3)


def test_blocks_of_any_size_give_the_same_ranks_and_loss(monkeypatch):
    chance = torch.Generator().manual_seed(3)
    images, texts = unit(53, 8), unit(101, 8, seed=1)
    texts[7] = texts[60]  # ties over the border of a block
    texts[10] = images[20]
    relevant = [sorted(torch.randperm(101, generator=chance)[: 1 + n % 4].tolist()) for n in range(53)]
    for text in range(101):
        if not any(text in row for row in relevant):
            relevant[text % 53].append(text)
    *whole, loss = retrieval_numbers(images, texts, relevant, 40.0)
    for rows, columns in ((7, 13), (1, 101), (53, 1)):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        monkeypatch.setattr(retrieval, "_COLUMNS", columns)
        *again, loss_again = retrieval_numbers(images, texts, relevant, 40.0)
        assert again == whole and loss_again == pytest.approx(loss, rel=1e-12)
    # Counted in the plain way.
    scores, mask = images @ texts.T, torch.zeros(53, 101, dtype=torch.bool)
    for row, columns in enumerate(relevant):
        mask[row, columns] = True
    for found, side, right in ((whole[0], scores, mask), (whole[1], scores.T, mask.T)):
        best = side.masked_fill(~right, -2).amax(1, keepdim=True)
        ranks = 1 + ((side >= best - 1e-12) & ~right).sum(1)
        assert found.median_rank == ranks.double().quantile(0.5).item()
        for k in (1, 5, 10):
            assert getattr(found, f"r{k}") == pytest.approx((ranks <= k).double().mean().item(), abs=1e-12)


def test_memory_does_not_grow_with_the_square_of_the_dataset(monkeypatch):
    """20,000 images and texts, whose similarity matrix would be 3.2 GB, in blocks of 34 MB."""
    images, texts = unit(20_000, 16).float(), unit(20_000, 16, seed=1).float()
    sizes, add = [], retrieval._Ranks.add

    def measured(self, rows, columns, scores):
        sizes.append(scores.nbytes)
        add(self, rows, columns, scores)

    monkeypatch.setattr(retrieval._Ranks, "add", measured)
    to_text, *_ = retrieval_numbers(images, texts, [[number] for number in range(20_000)], 1.0)
    assert max(sizes) < 40e6 and sum(sizes) == 8 * 20_000**2 and 1000 < to_text.median_rank < 19_000


def test_the_loss_of_the_whole_dataset_is_open_clips():
    import open_clip

    images, texts = unit(50, 16), unit(50, 16, seed=1)
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(30.0, dtype=torch.float64)).item()
    assert retrieval_numbers(images, texts, [[n] for n in range(50)], 30.0)[2] == pytest.approx(theirs, rel=1e-12)


def test_retrieval_does_not_depend_on_order_or_batches_and_a_copy_counts_once(model, tmp_path, monkeypatch):
    data = load_dataset(labels_folder(tmp_path / "a", 12))
    first = eval_retrieval(model, data)
    assert first.images == 12 and first.captions == 24
    monkeypatch.setattr(encoder_module, "BATCH", 5)
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


def numbered_and_named(tmp_path):
    """The same images, half of them captioned, the others in class folders that have WordNet's numbers, or names."""
    found = []
    captioned = load_dataset(labels_folder(tmp_path / "captioned", 4))
    for kind, folders in (("numbers", ("n01440764", "n02123045")), ("names", ("tench", "tabby cat"))):
        for number, folder in enumerate(folders):
            (tmp_path / kind / folder).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * number, 50, 50)).save(tmp_path / kind / folder / "1.png")
        found.append(combine_datasets([captioned, load_dataset(tmp_path / kind)]))
    return found


def test_classes_called_by_wordnet_ids_are_retrieved_by_their_names(model, tmp_path):
    numbered, named = numbered_and_named(tmp_path)
    found, expected = eval_retrieval(model, numbered), eval_retrieval(model, named)
    assert (found.image_to_text, found.text_to_image) == (expected.image_to_text, expected.text_to_image)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert any("named by WordNet IDs" in note for note in found.notes)
    (together,) = evaluate([Candidate("model", None, model)], numbered, Request(templates="none"))
    assert together.as_dict()["retrieval"] == found.as_dict()


def test_validation_uses_the_captions_of_the_training_whatever_the_classes_are_called(model, tmp_path):
    for number, folder in enumerate(("n00000001", "n00000002", "n00000003")):  # WordNet has no such thing
        (tmp_path / "classes" / folder).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (32, 32), (80 * number, 50 * copy, 50)).save(tmp_path / f"classes/{folder}/{copy}.png")
    data = load_dataset(tmp_path / "classes")
    config = TrainConfig.from_flat(epochs=1, batch_size=3, precision="fp32")
    result = train(model, data, data, config, run_folder=tmp_path / "run", device="cpu")
    assert len(result.validations) > 1


def test_a_note_counts_the_captions_that_are_cut(model, tmp_path):
    folder = labels_folder(tmp_path / "colours", 3, captions=1)
    labels = json.loads((folder / "labels.json").read_text())
    labels["000.png"] = ["word " * 100]
    (folder / "labels.json").write_text(json.dumps(labels))
    notes = eval_retrieval(model, load_dataset(folder)).notes
    assert any("1 of the 3 captions are longer than the 77 tokens that the model reads" in note for note in notes)
