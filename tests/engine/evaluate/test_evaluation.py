"""Evaluation against definitions and code that nobody here wrote, and against cases counted by hand."""

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
    combine_datasets,
    eval_retrieval,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
    load_full_clip,
    save_full_clip,
    to_gmp,
    train,
)
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate import retrieval, zero_shot
from clip_finetune.engine.evaluate.class_names import with_classes
from clip_finetune.engine.evaluate.encoder import Encoder, EncodingCache
from clip_finetune.engine.evaluate.intervals import bootstrap_interval, difference_interval
from clip_finetune.engine.evaluate.retrieval import contrastive_loss, retrieval_metrics
from clip_finetune.engine.evaluate.suite import evaluate, table_of
from clip_finetune.engine.evaluate.typographic.photographed import load_attacks
from clip_finetune.engine.evaluate.zero_shot import in_batch_share, ranks_of, zero_shot_of
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


def test_blocks_of_any_size_give_the_same_ranks_and_loss(monkeypatch):
    chance = torch.Generator().manual_seed(3)
    images, texts = unit(53, 8), unit(101, 8, seed=1)
    texts[7] = texts[60]  # ties over the border of a block
    texts[10] = images[20]
    relevant = [sorted(torch.randperm(101, generator=chance)[: 1 + n % 4].tolist()) for n in range(53)]
    for text in range(101):
        if not any(text in row for row in relevant):
            relevant[text % 53].append(text)
    whole, loss = retrieval_metrics(images, texts, relevant), contrastive_loss(images, texts, relevant, 40.0)
    for rows, columns in ((7, 13), (1, 101), (53, 1)):
        monkeypatch.setattr(retrieval, "_ROWS", rows)
        monkeypatch.setattr(retrieval, "_COLUMNS", columns)
        assert retrieval_metrics(images, texts, relevant) == whole
        assert contrastive_loss(images, texts, relevant, 40.0) == pytest.approx(loss, rel=1e-12)
    # Counted in the plain way.
    scores, mask = images @ texts.T, torch.zeros(53, 101, dtype=torch.bool)
    for row, columns in enumerate(relevant):
        mask[row, columns] = True
    for found, side, right in ((whole[0], scores, mask), (whole[1], scores.T, mask.T)):
        best = side.masked_fill(~right, -2).amax(1, keepdim=True)
        ranks = 1 + ((side >= best - 1e-12) & ~right).sum(1)
        assert found["median_rank"] == ranks.double().quantile(0.5).item()
        for k in (1, 5, 10):
            assert found[f"r{k}"] == pytest.approx((ranks <= k).double().mean().item(), abs=1e-12)


def test_memory_does_not_grow_with_the_square_of_the_set(monkeypatch):
    """20,000 pictures and texts, whose similarity matrix would be 3.2 GB, in blocks of 34 MB."""
    images, texts = unit(20_000, 16).float(), unit(20_000, 16, seed=1).float()
    sizes, add = [], retrieval._Ranks.add

    def measured(self, rows, columns, scores):
        sizes.append(scores.nbytes)
        add(self, rows, columns, scores)

    monkeypatch.setattr(retrieval._Ranks, "add", measured)
    to_text, _ = retrieval_metrics(images, texts, [[number] for number in range(20_000)])
    assert max(sizes) < 40e6 and sum(sizes) == 8 * 20_000**2 and 1000 < to_text["median_rank"] < 19_000


def test_the_loss_of_the_whole_set_is_open_clips():
    import open_clip

    images, texts = unit(50, 16), unit(50, 16, seed=1)
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(30.0, dtype=torch.float64)).item()
    assert contrastive_loss(images, texts, [[n] for n in range(50)], 30.0) == pytest.approx(theirs, rel=1e-12)


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


# ---- zero-shot -------------------------------------------------------------------------------------------------------


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


def test_what_classes_are_compared_with_is_open_clips_to_the_last_digits(model):
    import open_clip

    names, tokenizer = ["red", "great white shark", "dog"], Tokenizer(77)
    for templates in ("openai-80", "simple", "none"):
        sentences = zero_shot.sentences_of(templates)
        found = zero_shot.class_features(Encoder.of(model), names, sentences)
        theirs = open_clip.build_zero_shot_classifier(build_network(model).eval(), tokenizer, names, sentences)
        torch.testing.assert_close(found, theirs.T, rtol=0, atol=1e-6)


def test_classes_of_equal_score_are_not_won():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.4, 0.3]], dtype=torch.float64)
    right = torch.tensor([[True, False, False], [False, False, True]])
    assert ranks_of(scores, right).tolist() == [2, 3]


def test_what_is_mistaken_for_what_is_counted(model, tmp_path, monkeypatch):
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
    monkeypatch.setattr(zero_shot, "_TOGETHER", 20)
    monkeypatch.setattr(encoder_module, "BATCH", 7)
    turned = eval_zero_shot(model, data.subset(list(reversed(range(24)))), templates="simple")
    assert turned.details() == details and turned.as_dict() == found.as_dict()


def test_a_picture_in_two_classes_is_one_picture_that_both_are_right_for(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=2)
    shutil.copy(folder / "red/0.png", folder / "blue/again.png")
    found = eval_zero_shot(model, load_dataset(folder), templates="none")
    assert found.images == 8 and found.per_class_images == {"blue": 3, "green": 2, "red": 2, "yellow": 2}


def test_a_table_of_several_answers_a_picture_counts_each_picture_once(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=2)
    rows = [f"{name}/{n}.png,{name}" for name in COLOURS for n in range(2)]
    table = "\n".join(["image,label", *rows, *rows, rows[0].replace(",red", ",blue")])
    (folder / "human_responses.csv").write_text(table)
    data = load_dataset(folder, "labels")
    found, plain = eval_zero_shot(model, data), eval_zero_shot(model, load_dataset(folder, "folders"))
    assert data.format == "labels" and found.images == 8 and found.as_dict() == plain.as_dict()


def test_a_labels_json_of_class_names_is_classified(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=3)
    plain = eval_zero_shot(model, load_dataset(folder))
    labels = {f"{name}/{n}.png": [name, "something longer"] for name in COLOURS for n in range(3)}
    (folder / "labels.json").write_text(json.dumps(labels))
    data = load_dataset(folder)
    found = eval_zero_shot(model, data)
    assert not data.has_labels and found.per_class == plain.per_class
    assert "first captions of its pictures are taken for" in found.notes[0]
    (result,) = evaluate([("model", model)], data)
    assert result["zero_shot"] == plain.as_dict() and result["retrieval"]["captions"] == 5
    with pytest.raises(UserError, match="no classes"):
        eval_zero_shot(model, load_dataset(labels_folder(tmp_path / "captions")))


def wnid_folder(folder, wnids):
    for number, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        Image.new("RGB", (32, 32), (9 * number % 256, 50, 50)).save(folder / wnid / "1.png")
    return folder


def test_imagenets_folder_names_become_class_names(model, tmp_path):
    import open_clip

    data = load_dataset(wnid_folder(tmp_path / "few", ["n02123045", "n01440764", "n15075141"]))
    named, notes = with_classes(data)
    assert named.class_names == ("tench", "tabby cat", "toilet paper") and "ImageNet's" in notes[0]
    assert set(named.class_names) <= set(open_clip.IMAGENET_CLASSNAMES)
    found = eval_zero_shot(model, data, templates="none")
    assert set(found.per_class) == set(named.class_names) and notes[0] in found.notes
    # n02084071 is dog, which is none of the 1,000; both words for sunglasses are.
    odd = load_dataset(wnid_folder(tmp_path / "odd", ["n02084071", "n04355933", "n04356056"]))
    named, notes = with_classes(odd)
    assert named.class_names == ("dog", "sunglasses", "sunglasses")
    assert "none of ImageNet's 1,000" in notes[1] and "no model can tell these apart" in notes[2]
    found = eval_zero_shot(model, odd, templates="none")
    assert set(found.per_class) == {"dog", "sunglasses (1)", "sunglasses (2)"}
    assert found.per_class["sunglasses (1)"] == found.per_class["sunglasses (2)"] == 0


def test_all_of_imagenets_names_are_in_open_clips_order(tmp_path):
    import open_clip
    from timm.data import ImageNetInfo

    data = load_dataset(wnid_folder(tmp_path / "all", ImageNetInfo("imagenet-1k").label_names()))
    assert with_classes(data)[0].class_names == tuple(open_clip.IMAGENET_CLASSNAMES)


def test_a_file_beside_the_folders_says_what_they_are_called(tmp_path):
    folder = wnid_folder(tmp_path / "val", ["n00000001", "n01440764"])
    with pytest.raises(UserError, match="n00000001 is called is not known here; put a file LOC_synset_mapping.txt"):
        with_classes(load_dataset(folder))
    (tmp_path / "classes.txt").write_text("n00000001\tmy thing\nn01440764\tfish, and more\nnonsense\n")
    named, notes = with_classes(load_dataset(folder))
    assert named.class_names == ("my thing", "fish") and "from classes.txt" in notes[0]
    (folder / "LOC_synset_mapping.txt").write_text("n00000001 nearer, it is\n")
    assert with_classes(load_dataset(folder))[0].class_names == ("nearer", "tench")


def test_a_bootstrap_interval_is_that_of_drawing_with_replacement():
    values = torch.tensor([1.0] * 37 + [0.0] * 63)
    low, high = bootstrap_interval(values)
    drawn = numpy.random.default_rng(7).choice(values.numpy(), size=(20_000, 100)).mean(1)
    assert (low, high) == pytest.approx(numpy.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.011)
    assert bootstrap_interval(values.flip(0)) == (low, high) and low < 0.37 < high
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_the_interval_of_a_difference_is_that_of_pairs():
    """Two models that are right on the same pictures but one differ surely, however wide their own intervals are."""
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
    assert "not accuracy" in table_of(evaluate([("model", model)], data, protocol="published"))
    with pytest.raises(UserError, match="protocol 'other' is not known; choose whole set or published"):
        eval_zero_shot(model, data, protocol="other")


def test_the_published_figure_gets_bare_names_of_any_length_and_no_order(model, tmp_path, monkeypatch):
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


# ---- what is computed once -------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """How many pictures and texts went through a network."""
    counts = {"images": 0, "texts": 0}
    build = encoder_module.build_network

    def counting(*arguments, **options):
        network = build(*arguments, **options)
        image, text = network.encode_image, network.encode_text

        def encode_image(pictures, **more):
            counts["images"] += len(pictures)
            return image(pictures, **more)

        def encode_text(tokens, **more):
            counts["texts"] += len(tokens)
            return text(tokens, **more)

        network.encode_image, network.encode_text = encode_image, encode_text
        return network

    monkeypatch.setattr(encoder_module, "build_network", counting)
    return counts


def both_kinds(folder, per_class=3):
    """Pictures with classes and captions."""
    class_folder(folder, per_class=per_class)
    rows = [f"{name}/{n}.png,{name}" for name in COLOURS for n in range(per_class)]
    (folder / "labels.json").write_text(json.dumps({row.split(",")[0]: [row.split(",")[1]] for row in rows}))
    return load_dataset(folder)


def test_one_evaluation_encodes_each_picture_once(model, tmp_path, passes):
    data = both_kinds(tmp_path / "both")
    (result,) = evaluate([("model", model)], data, templates="simple")
    assert "zero_shot" in result and "retrieval" in result
    assert passes == {"images": 12, "texts": 4 * 7 + 4}
    passes.update(images=0, texts=0)
    evaluate([("model", model), ("baseline", random_clip(seed=4))], data, templates="none", typographic=True)
    assert passes["images"] == 2 * (12 + 12)  # clean, and with words
    for templates in ("openai-80", "none"):
        (result,) = evaluate([("model", random_clip(seed=4))], data, templates=templates, typographic=True)
        assert result["typographic"]["accuracy_clean"] == result["zero_shot"]["top1"]
        assert result["typographic"] == eval_typographic(random_clip(seed=4), data, templates=templates).as_dict()


def test_evaluators_that_share_a_cache_encode_each_picture_and_text_once(model, tmp_path, passes):
    data, cache = both_kinds(tmp_path / "both"), EncodingCache()
    alone = [eval_zero_shot(model, data).as_dict(), eval_retrieval(model, data).as_dict()]
    alone.append(eval_typographic(model, data))
    passes.update(images=0, texts=0)
    counted, progress = [], []

    def total():
        counted.append(dict(passes))

    shared = [eval_zero_shot(model, data, features=cache).as_dict()]
    total()
    shared.append(eval_retrieval(model, data, features=cache, on_progress=lambda *n: progress.append(n)).as_dict())
    total()
    shared.append(eval_typographic(model, data, features=cache))
    total()
    assert shared == alone and progress[-1] == (12, 12)
    assert [count["images"] for count in counted] == [12, 12, 24]  # those with words are drawn anew
    assert [count["texts"] for count in counted] == [320, 324, 324 + 28]
    assert eval_zero_shot(model, data, features=cache).as_dict() == alone[0] and passes["images"] == 24
    # Another model, another picture, or the same name with other bytes is encoded.
    eval_zero_shot(random_clip(seed=4), data, features=cache)
    assert passes["images"] == 36
    Image.new("RGB", (32, 32), "white").save(tmp_path / "both/red/0.png")
    eval_zero_shot(model, data, features=cache)
    assert passes["images"] == 37
    eval_zero_shot(model.derive({}, step="the same"), data, features=cache)
    assert passes["images"] == 37


def test_texts_of_equal_tokens_have_the_same_bits_in_any_batch_and_out_of_the_cache(model):
    from clip_finetune.engine.evaluate.encoder import Encoder, EncodingCache

    encoder = Encoder.of(model, device="cpu", features=EncodingCache())
    first = encoder.texts([*(f"thing {number}" for number in range(70)), "A Dog  on grass"])[-1]
    assert torch.equal(encoder.texts(["a dog on grass"])[0], first)
    rows = encoder.passing_texts(["Dog", *(f"a much longer text of number {number}" for number in range(70)), "dog"])
    assert torch.equal(rows[0], rows[-1]) and not torch.equal(rows[0], rows[1])


def test_the_short_set_is_the_default_for_words_that_are_on_the_pictures_alone(model, tmp_path):
    drawn = load_dataset(class_folder(tmp_path / "drawn"))
    (found,) = evaluate([("model", model)], drawn, typographic=True)
    assert found["zero_shot"] == eval_zero_shot(model, drawn, templates="openai-80").as_dict()
    assert found["typographic"] == eval_typographic(model, drawn, templates="openai-80").as_dict()
    (tmp_path / "real").mkdir()
    for number, file in enumerate(sorted((tmp_path / "drawn").rglob("*.png"))):
        shutil.copy(file, tmp_path / "real" / f"label={file.parent.name}_text={'dog' if number % 2 else 'cup'}.png")
    real = load_attacks(tmp_path / "real")
    for templates in (None, "none"):
        (found,) = evaluate([("model", model)], real, typographic=True, templates=templates)
        expected = eval_typographic(model, real, templates=templates or "simple")
        assert found["typographic"] == expected.as_dict() and "zero_shot" not in found


def numbered_and_named(tmp_path):
    """The same pictures, half of them captioned, the others in class folders that have WordNet's numbers, or names."""
    found = []
    captioned = load_dataset(labels_folder(tmp_path / "captioned", 4))
    for kind, folders in (("numbers", ("n01440764", "n02123045")), ("names", ("tench", "tabby cat"))):
        for number, folder in enumerate(folders):
            (tmp_path / kind / folder).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * number, 50, 50)).save(tmp_path / kind / folder / "1.png")
        found.append(combine_datasets([captioned, load_dataset(tmp_path / kind)]))
    return found


def test_classes_called_by_wordnets_numbers_are_searched_for_by_their_names(model, tmp_path):
    numbered, named = numbered_and_named(tmp_path)
    found, expected = eval_retrieval(model, numbered), eval_retrieval(model, named)
    assert (found.image_to_text, found.text_to_image) == (expected.image_to_text, expected.text_to_image)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert any("WordNet's numbers for names" in note for note in found.notes)
    (together,) = evaluate([("model", model)], numbered, templates="none")
    assert together["retrieval"] == found.as_dict()


def test_a_training_measures_the_captions_that_it_trains_on_whatever_its_classes_are_called(model, tmp_path):
    for number, folder in enumerate(("n00000001", "n00000002", "n00000003")):  # WordNet has no such thing
        (tmp_path / "classes" / folder).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (32, 32), (80 * number, 50 * copy, 50)).save(tmp_path / f"classes/{folder}/{copy}.png")
    data = load_dataset(tmp_path / "classes")
    config = TrainConfig.from_flat(epochs=1, batch_size=3, precision="fp32")
    result = train(model, data, data, config, run_folder=tmp_path / "run", device="cpu")
    assert len(result.validations) > 1


def test_a_broken_model_among_several_is_named(model, tmp_path):
    nothing = torch.full_like(model.state_dict["text_projection"], torch.nan)
    broken = model.derive({"text_projection": nothing}, step="broken")
    save_full_clip(broken, tmp_path / "broken.safetensors")
    data = load_dataset(labels_folder(tmp_path / "colours", 4))
    with pytest.raises(UserError, match="broken.safetensors: The model computes values that are not numbers"):
        evaluate([("model", model), ("model", str(tmp_path / "broken.safetensors"))], data)


def test_captions_that_are_cut_are_told(model, tmp_path):
    folder = labels_folder(tmp_path / "colours", 3, captions=1)
    labels = json.loads((folder / "labels.json").read_text())
    labels["000.png"] = ["word " * 100]
    (folder / "labels.json").write_text(json.dumps(labels))
    notes = eval_retrieval(model, load_dataset(folder)).notes
    assert any("1 of the 3 captions are longer than the 77 tokens that the model reads" in note for note in notes)


def test_the_cache_knows_the_transform_and_the_activation(model, tmp_path, passes):
    import dataclasses

    from clip_finetune.engine.data.images.transforms import Transform
    from clip_finetune.engine.evaluate.encoder import with_trained_transform

    data, cache = load_dataset(class_folder(tmp_path / "classes")), EncodingCache()
    padded = with_trained_transform(model.provenance, Transform(image_size=32, resize_mode="pad"))
    other = dataclasses.replace(model.architecture, activation="gelu")
    kinds = (model, dataclasses.replace(model, provenance=padded), dataclasses.replace(model, architecture=other))
    for number, kind in enumerate(kinds, 1):
        eval_zero_shot(kind, data, features=cache, templates="none")
        assert passes["images"] == 12 * number


def test_the_cache_is_bounded_and_what_was_asked_for_last_stays():
    cache = EncodingCache(limit=10 * (4000 + encoder_module._ENTRY_BYTES))
    for number in range(25):
        cache.put(number, torch.full((1000,), float(number)))
        assert cache.get(0) is not None
    assert cache.bytes <= cache.limit and cache.get(24)[0] == 24 and cache.get(5) is None
    batch = torch.zeros(100, 10)
    cache.put("row", batch[3])
    assert cache.get("row").untyped_storage().nbytes() == 40


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a model that has learnt to tell noisy colours apart, 400 pictures of which it knows most)."""
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


def test_an_empty_validation_part_is_told(model, tmp_path):
    for folder, measure in ((labels_folder, eval_retrieval), (class_folder, eval_zero_shot)):
        data = load_dataset(folder(tmp_path / folder.__name__)).subset([])
        with pytest.raises(UserError, match="set validation_split above 0"):
            measure(model, data)


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
        "?",
        "0 s",
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 0 min",
        "3 h 20 min",
    ]


def test_a_table_is_aligned():
    assert table([{"model": "a", "x": "1"}, {"model": "bb", "y": "22"}]).splitlines() == [
        "model  x   y",
        "-----  -  --",
        "a      1",
        "bb        22",
    ]


def test_a_model_of_nan_is_refused_and_never_wins(tmp_path):
    from clip_finetune.engine.evaluate.encoder import BrokenModel

    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    captioned, classes = load_dataset(labels_folder(tmp_path / "a")), load_dataset(class_folder(tmp_path / "b"))
    for measure, data in ((eval_retrieval, captioned), (eval_zero_shot, classes), (eval_typographic, classes)):
        with pytest.raises(BrokenModel, match="not numbers"):
            measure(broken, data)
