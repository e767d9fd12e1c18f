"""The check of the evaluators against published figures."""

import dataclasses
import json
import random

import pytest
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import UserError, load_dataset, save_full_clip
from clip_finetune.engine.cli import main
from clip_finetune.engine.evaluate.selfcheck import PUBLISHED, Figure, judge, karpathy_test, selfcheck


def test_the_verdict_names_the_right_activation():
    figures = (Figure("top 1", "imagenet", 0.755, 0.004, 50_000),)
    good, bad, worse = ({"top 1": value} for value in (0.7541, 0.70, 0.3))
    passed, words = judge("quick_gelu", figures, {"quick_gelu": good, "gelu": bad})
    assert passed and "are right" in words
    passed, words = judge("gelu", figures, {"gelu": bad, "quick_gelu": good})
    assert not passed and "The activation is wrong" in words and "--activation quick_gelu" in words
    passed, words = judge("gelu", figures, {"gelu": worse, "quick_gelu": bad})
    assert not passed and "not reached with either" in words and "quick_gelu comes nearer" in words
    assert [figure.value for figure in PUBLISHED] == [0.755, 0.611, 0.792]


SIZES = {"imagenet": 32, "coco": 40}


@pytest.fixture
def sets(tmp_path):
    """Stand-ins for ImageNet and COCO, of these sizes."""
    class_folder(tmp_path / "imagenet", per_class=8)
    labels_folder(tmp_path / "coco", 40)
    return {"imagenet": tmp_path / "imagenet", "coco": tmp_path / "coco"}


def test_the_self_check_measures_with_both_activations(model, sets):
    from clip_finetune.engine import eval_retrieval, eval_zero_shot

    # Of random weights so small that the activation hardly matters, larger ones.
    model = model.derive({name: 20 * w for name, w in model.state_dict.items() if ".mlp." in name}, step="larger")
    right = eval_retrieval(model, load_dataset(sets["coco"]))
    values = (
        eval_zero_shot(model, load_dataset(sets["imagenet"])).top1,
        right.text_to_image.r5,
        right.image_to_text.r5,
    )
    published = [
        dataclasses.replace(f, value=v, tolerance=1e-9, images=SIZES[f.on])
        for f, v in zip(PUBLISHED, values, strict=True)
    ]
    found = selfcheck(model, **sets, published=published)
    assert found.passed and found.activation == "quick_gelu" and set(found.measured) == {"quick_gelu", "gelu"}
    assert found.measured["quick_gelu"] != found.measured["gelu"], "else this test shows nothing"
    wrong = dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, activation="gelu"))
    told = selfcheck(wrong, **sets, published=published)
    assert not told.passed and "--activation quick_gelu" in told.verdict
    assert "measured (gelu)" in told.table() and told.as_dict()["figures"][0]["published"] == values[0]
    alone = selfcheck(model, coco=sets["coco"], published=published)
    assert [figure.on for figure in alone.figures] == ["coco", "coco"] and alone.passed


def _karpathy(folder, file, test, rest):
    """COCO's folder with a file of the split's, whose images have numbers."""

    def named(number):
        return f"COCO_val2014_{number:012d}.jpg"

    blip = [{"image": f"val2014/{named(number)}", "caption": captions} for number, captions in test.items()]
    own = [
        {
            "filepath": "val2014",
            "filename": named(number),
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions],
        }
        for split, part in (("test", test), ("restval", rest))
        for number, captions in part.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(blip if "karpathy" in file.name else {"images": own, "dataset": "coco"}))
    return folder


@pytest.mark.parametrize("file", ["dataset_coco.json", "karpathy/dataset_coco.json", "coco_karpathy_test.json"])
@pytest.mark.parametrize("pictures", ["val2014/COCO_val2014_{:012d}.jpg", "images/train2017/{:012d}.jpg"])
def test_only_the_test_part_of_karpathys_split_counts(model, tmp_path, file, pictures):
    from clip_finetune.engine import eval_retrieval

    chance, top = random.Random(0), tmp_path / "coco"
    test = {number: [f"picture {number}", f"number {number} "] for number in range(100, 130)}
    rest = {number: [f"other {number}"] for number in range(200, 220)}
    for number in (*test, *rest):
        (top / pictures.format(number)).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), tuple(chance.choices(range(256), k=3))).save(top / pictures.format(number))
    (top / pictures.format(100)).with_suffix(".json").write_text("{}")  # what lies beside an image is none
    _karpathy(top, top / file, test, rest)
    found = karpathy_test(top)
    assert [tuple(map(str.strip, captions)) for captions in test.values()] == list(found.captions)
    assert not found.missing() and len(found) == 30
    right = eval_retrieval(model, found)
    assert right.captions == 60 and right.images == 30
    published = [dataclasses.replace(figure, images=30) for figure in PUBLISHED]
    checked = selfcheck(model, coco=top, published=published).measured[model.architecture.activation]
    assert checked["COCO text to image R@5"] == right.text_to_image.r5
    with pytest.raises(UserError, match="--coco has 30 images, and .* for 5,000, the test part of Karpathy"):
        selfcheck(model, coco=top)


def test_a_damaged_split_file_is_refused_and_without_one_there_is_none(tmp_path):
    assert karpathy_test(tmp_path) is None
    odd = ('{"image": "1.jpg", "caption": 7}', '{"image": ["a"], "caption": ["x"]}', '{"image": 12, "caption": ["x"]}')
    for text in ('{"images": [{"split": "test"}]}', "{", "[1]", "7", "[" * 100_000, *(f"[{record}]" for record in odd)):
        (tmp_path / "dataset_coco.json").write_text(text)
        with pytest.raises(UserError, match="is not Karpathy's split of COCO .*; download it again"):
            karpathy_test(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"split": "train"}]}')
    with pytest.raises(UserError, match="lists no test image"):
        karpathy_test(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('[{"image": "1.jpg", "caption": "a dog"}]')
    assert list(karpathy_test(tmp_path).captions) == [("a dog",)]


def test_the_self_check_on_the_command_line(model, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.delenv("COCO", raising=False)
    assert main(["eval", "--selfcheck"]) == 1
    told = capsys.readouterr().err
    assert "The self-check needs a dataset with published figures: give --imagenet" in told and told.count("\n") == 1
    assert main(["eval", "--selfcheck", "--coco", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    save_full_clip(model, tmp_path / "tiny.safetensors")
    swapped = ["--imagenet", str(sets["coco"]), "--model", str(tmp_path / "tiny.safetensors")]
    assert main(["eval", "--selfcheck", *swapped]) == 1
    assert "has no subfolder of images for each class" in capsys.readouterr().err
    arguments = ["--imagenet", str(sets["imagenet"]), "--model", str(tmp_path / "tiny.safetensors")]
    assert main(["eval", "--selfcheck", *arguments]) == 1
    assert "--imagenet has 32 images, and the published figures are for 50,000" in capsys.readouterr().err
    small = [dataclasses.replace(figure, images=SIZES[figure.on]) for figure in PUBLISHED]
    monkeypatch.setitem(selfcheck.__kwdefaults__, "published", small)
    assert main(["eval", "--selfcheck", *arguments, "--json", str(tmp_path / "check.json")]) == 1
    assert "published figures are not reached" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
    assert main(["eval", "--model", "x"]) == 1 and "eval needs --model and --data" in capsys.readouterr().err
    for more in (["--html", "x.html"], ["--baseline", "x"], ["--typographic"], ["--templates", "none"]):
        assert main(["eval", "--selfcheck", *arguments, *more]) == 1
        assert f"does nothing with {more[0]}; leave it out" in capsys.readouterr().err
