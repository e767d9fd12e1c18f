"""Words written on pictures, one picture beside some texts, and the check of this program against published figures."""

import dataclasses
import json
import random

import numpy
import pytest
import torch
from clips import random_clip
from image_folders import SCAM, class_folder, labels_folder, load_image, scam_folder
from PIL import Image, ImageDraw
from torch.nn import functional as F

from clip_finetune.engine import UserError, build_network, eval_typographic, load_dataset, save_full_clip
from clip_finetune.engine.cli import main
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.evaluate import encoder
from clip_finetune.engine.evaluate.coco import karpathy_test
from clip_finetune.engine.evaluate.ranking import rank_captions
from clip_finetune.engine.evaluate.selfcheck import PUBLISHED, Figure, judge, selfcheck
from clip_finetune.engine.evaluate.suite import evaluate, notes_of, percent
from clip_finetune.engine.evaluate.typographic.attack import attacked_image, fooled_apart
from clip_finetune.engine.evaluate.typographic.drawing import can_be_drawn, write_word
from clip_finetune.engine.evaluate.typographic.photographed import (
    CLEAN,
    HAND_WRITTEN,
    SYNTHETIC,
    WrittenOn,
    attacks_in,
    load_attacks,
)
from clip_finetune.engine.report.attack_charts import attack_chart, ranking_chart, share_chart


@pytest.fixture(scope="module")
def model():
    return random_clip()


def features_of(model, pictures, texts, template="{}"):
    """Unit features by open_clip's own calls."""
    network, tokenizer = build_network(model).eval(), Tokenizer(77)
    with torch.no_grad():
        images = F.normalize(network.encode_image(normalize(torch.stack(pictures))), dim=1)
        return images.double(), F.normalize(network.encode_text(tokenizer(texts)), dim=1).double()


# ---- words that are drawn --------------------------------------------------------------------------------------------


def plain(side=64, shade=120):
    return torch.full((3, side, side), shade, dtype=torch.uint8)


@pytest.mark.parametrize(
    "word", ["dog", "great white shark", "Übersee", "собака", "a" * 60, "aircraft carrier, flattop"]
)
def test_a_word_is_drawn_whole_and_the_same_for_the_same_chance(word):
    for number in range(20):
        one, other = (write_word(plain(), word, random.Random(number)) for _ in range(2))
        assert torch.equal(one, other) and one.shape == (3, 64, 64) and one.dtype == torch.uint8
        changed = (one != plain()).any(0)
        assert changed.sum() > 5


@pytest.mark.parametrize("word", ["dog", "a" * 60, "aircraft carrier, flattop", "W W W W W W W W W W W W W W"])
def test_no_letter_is_cut_off(word, monkeypatch):
    boxes = []

    def drawn(self, place, text, font=None, stroke_width=0, **more):
        boxes.append(self.multiline_textbbox(place, text, font=font, stroke_width=stroke_width, align="center"))

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", drawn)
    for number in range(40):
        write_word(plain(224), word, random.Random(number))
    assert len(boxes) == 40
    assert all(left >= -1 and top >= -1 and right <= 225 and bottom <= 225 for left, top, right, bottom in boxes)


def test_words_differ_in_size_place_font_and_contrast():
    drawn = [write_word(plain(), "dog", random.Random(number)) for number in range(30)]
    assert len({picture.numpy().tobytes() for picture in drawn}) == 30
    heights = {int((picture != plain()).any(0).any(1).sum()) for picture in drawn}
    contrasts = {int(picture.max()) - int(picture.min()) for picture in drawn}
    assert len(heights) > 5 and len(contrasts) > 2


def test_letters_that_no_font_has_are_known():
    assert can_be_drawn("dog") and can_be_drawn("кот") and not can_be_drawn("犬") and not can_be_drawn(" ")


def drawn_reference(model, data, result, seed):
    """The accuracies of the pictures as they were drawn, computed apart."""
    import open_clip

    transform = Transform(image_size=32)
    pictures = [numpy.array(attacked_image(data, found, transform, seed)) for found in result.attacked]
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


def test_accuracy_under_attack_is_that_of_the_pictures_as_they_are_shown(model, tmp_path):
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


def test_pictures_that_tell_two_models_apart_are_found(model, tmp_path):
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


# ---- words that are on the pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata.jsonl", "scam.csv"])
def test_scams_layout_is_read_with_or_without_the_data_set_reader(tmp_path, table):
    folder = scam_folder(tmp_path / "scam", table)
    for data in (load_attacks(folder), load_dataset(folder), load_dataset(folder, caption_column="object_label")):
        known = attacks_in(data)
        assert len(known) == len(data) == 18
        named = {data.names[index]: found for index, found in known.items()}
        assert named["SynthSCAM_4.png"] == WrittenOn("object 1", "word 4", SYNTHETIC)
        assert {found.kind for found in known.values()} == set(SCAM.values())


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


def test_rta_100s_names_are_read(model, tmp_path):
    for number, (shows, word) in enumerate([("cup", "dog"), ("hot dog", "cat")]):
        name = f"label={shows}_text={word}.jpg"
        (tmp_path / "rta").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (200 * number, 90, 90)).save(tmp_path / "rta" / name)
    data = load_attacks(tmp_path / "rta")
    assert sorted(found.word for found in attacks_in(data).values()) == ["cat", "dog"]
    found = eval_typographic(model, data)
    assert found.accuracy_clean is None and found.as_dict()["accuracy_clean"] is None and found.images == 2


def test_a_folder_without_attacks_is_none_and_a_type_that_is_not_known_is_told(tmp_path):
    assert load_attacks(class_folder(tmp_path / "classes")) is None and load_attacks(tmp_path / "nowhere") is None
    (tmp_path / "classes/notes.csv").write_text("name,price\nfile_name,1\n")
    assert load_attacks(tmp_path / "classes") is None
    folder = scam_folder(tmp_path / "odd", "table.csv")
    text = (folder / "table.csv").read_text().replace("SynthSCAM,object", "painted,object")
    (folder / "table.csv").write_text(text)
    with pytest.raises(UserError, match="of the type 'painted'; write clean, hand-written or synthetic"):
        load_attacks(folder)


def test_a_table_names_no_picture_outside_its_folder(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/t.csv").write_text("file_name,object_label,attack_word\n../secret.png,cup,dog\n")
    assert load_attacks(tmp_path / "set") is None


def test_without_an_attacked_picture_there_is_no_figure_and_without_a_clean_word_no_share(model, tmp_path):
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
        lambda: evaluate([("model", model)], load_attacks(folder), typographic=True),
    ):
        with pytest.raises(UserError, match="None of the pictures of scam that have words on them can be opened; put"):
            measure()


def test_blank_lines_of_a_table_are_skipped_and_damage_is_told(tmp_path):
    folder = scam_folder(tmp_path / "scam")
    table, lines = folder / "metadata.jsonl", (folder / "metadata.jsonl").read_text().splitlines()
    for text in ("\n" * 30 + "\n\n".join(lines), "\ufeff\n  \n" + "\n".join(lines) + "\n\n"):
        table.write_text(text, encoding="utf-8")
        assert len(attacks_in(load_attacks(folder))) == 18
    for number, damaged in ((1, "{"), (1, "[" * 100_000), (3, lines[2][:-9]), (18, "12"), (2, "[1]")):
        table.write_text("\n".join([*lines[: number - 1], damaged, *lines[number:]]))
        with pytest.raises(UserError, match=rf"metadata.jsonl is damaged: line {number} is .*; mend that line"):
            load_attacks(folder)
    # Another file is none of ours, whatever is in it.
    for text in ('{"text": "a"}\n{', "{\n" + '{"text": "a"}\n' + lines[0], "nonsense\n" * 30 + lines[0], "[" * 100_000):
        table.write_text(text)
        assert load_attacks(folder) is None
    table.unlink()
    rows = scam_folder(tmp_path / "csv", "t.csv") / "t.csv"
    rows.write_text("\n \n" + rows.read_text())
    assert len(load_attacks(tmp_path / "csv")) == 18


def test_what_is_no_readable_table_ends_in_a_sentence_or_is_passed_over(tmp_path, ordinary_user):
    folder = scam_folder(tmp_path / "scam")
    (folder / "folder.csv").mkdir()
    try:
        (folder / "link.jsonl").symlink_to(folder / "nowhere.jsonl")
    except OSError:  # Windows lets not everyone make links
        pass
    assert len(attacks_in(load_attacks(folder))) == 18
    open_folder, as_user = ordinary_user
    locked = open_folder / "locked"
    scam_folder(locked)
    (locked / "metadata.jsonl").chmod(0)
    with as_user(), pytest.raises(UserError, match="metadata.jsonl cannot be read .*; make it readable or move it"):
        load_attacks(locked)
    locked.chmod(0)
    with as_user():
        assert load_attacks(locked) is None
    locked.chmod(0o755)


def test_classes_of_one_and_the_same_picture_leave_nothing_to_write(model, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "same" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "same" / name / "1.png")
    with pytest.raises(UserError, match="same belong to all of its classes at once.*put different pictures"):
        eval_typographic(model, load_dataset(tmp_path / "same"))


def test_the_command_attacks(model, tmp_path, monkeypatch, capsys):
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


# ---- one picture and some texts --------------------------------------------------------------------------------------


def test_texts_are_ranked_by_cosine_and_shared_at_the_models_own_scale(model, tmp_path):
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=numpy.uint8))
    picture.save(tmp_path / "picture.png")
    texts = ["a cat", "a dog", "a red square"]
    images, expected = features_of(model, [load_image(tmp_path / "picture.png", 32)], texts)
    cosines = (images @ expected.T)[0]
    found = rank_captions(model, picture, ["a cat", "", "a dog", " a cat ", "a red square"])
    assert found.texts == tuple(texts)
    assert found.cosines == pytest.approx(cosines.tolist(), abs=1e-6)
    scale = model.state_dict["logit_scale"].double().exp()
    assert found.shares == pytest.approx((cosines * scale).softmax(0).tolist(), abs=1e-5)
    assert found.logit_scale == pytest.approx(scale.item()) and sum(found.shares) == pytest.approx(1)
    assert found.order == cosines.argsort(descending=True).tolist()
    assert [line["text"] for line in found.as_dict()["texts"]] == [texts[place] for place in found.order]


def test_ranking_needs_a_text_and_tells_of_long_ones(model):
    picture = Image.new("RGB", (40, 40))
    for texts in ([], ["", "  "]):
        with pytest.raises(UserError, match="no text to rank; write one a line"):
            rank_captions(model, picture, texts)
    with pytest.raises(UserError, match="at most 1000"):
        rank_captions(model, picture, [str(number) for number in range(1001)])
    short, long = (rank_captions(model, picture, texts) for texts in (["one"], ["word " * 100]))
    assert "longer than the model reads" in long.notes[0]
    assert notes_of(long) == notes_of(long, long) == list(long.notes) and notes_of(short) == []
    assert notes_of(short, long) == [f"Of the baseline: {long.notes[0]}"]
    assert notes_of(long, short) == [f"Of the model: {long.notes[0]}"]
    for mode in ("L", "RGBA", "P"):
        assert rank_captions(model, Image.new(mode, (40, 40)), ["one"]).shares == (1.0,)


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_charts_are_drawn_without_alpha_from_few_and_many_numbers():
    picture = Image.new("RGB", (30, 20), "red")
    groups = {"right, clean": {"baseline": 0.5, "model": 0.6}, "the word wins": {"baseline": 1.0, "model": 0.0}}
    bare = attack_chart(groups, [])
    sheet = attack_chart(groups, [(picture, "a $caption_")] * 8, title="t", heading="those:")
    assert bare.mode == sheet.mode == "RGB" and sheet.height > bare.height + 400 and sheet.width == bare.width
    assert share_chart({}).mode == "RGB"
    plain_chart = share_chart(groups)
    whiskers = share_chart(groups, intervals={"right, clean": {"model": (0.5, 0.7)}})
    assert plain_chart.tobytes() != whiskers.tobytes()
    confused = share_chart(groups, confused={"model": [("a", "b", 3)], "baseline": []})
    assert confused.height > plain_chart.height
    one = ranking_chart(picture, ["a $x_y^"], {"model": [1.0]}, {"model": [0.3]})
    shares = {name: [0.05] * 20 for name in ("model", "baseline")}
    many = ranking_chart(picture, ["text " * 40] * 20, shares, shares)
    assert one.mode == many.mode == "RGB" and many.height > one.height


# ---- the self-check --------------------------------------------------------------------------------------------------


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
        right.text_to_image["r5"],
        right.image_to_text["r5"],
    )
    published = [
        dataclasses.replace(f, value=v, tolerance=1e-9, pictures=SIZES[f.on])
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
    """COCO's folder with a file of the split's, whose pictures have numbers."""

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
    (top / pictures.format(100)).with_suffix(".json").write_text("{}")  # what lies beside a picture is none
    _karpathy(top, top / file, test, rest)
    found = karpathy_test(top)
    assert [tuple(map(str.strip, captions)) for captions in test.values()] == list(found.captions)
    assert not found.missing() and len(found) == 30
    right = eval_retrieval(model, found)
    assert right.captions == 60 and right.images == 30
    published = [dataclasses.replace(figure, pictures=30) for figure in PUBLISHED]
    checked = selfcheck(model, coco=top, published=published).measured[model.architecture.activation]
    assert checked["COCO text to image R@5"] == right.text_to_image["r5"]
    with pytest.raises(UserError, match="--coco has 30 pictures, and .* those of 5,000, the test part of Karpathy"):
        selfcheck(model, coco=top)


def test_a_damaged_split_is_told_and_without_one_there_is_none(tmp_path):
    assert karpathy_test(tmp_path) is None
    odd = ('{"image": "1.jpg", "caption": 7}', '{"image": ["a"], "caption": ["x"]}', '{"image": 12, "caption": ["x"]}')
    for text in ('{"images": [{"split": "test"}]}', "{", "[1]", "7", "[" * 100_000, *(f"[{record}]" for record in odd)):
        (tmp_path / "dataset_coco.json").write_text(text)
        with pytest.raises(UserError, match="is not Karpathy's split of COCO .*; download it anew"):
            karpathy_test(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"split": "train"}]}')
    with pytest.raises(UserError, match="tells of no test picture"):
        karpathy_test(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('[{"image": "1.jpg", "caption": "a dog"}]')
    assert list(karpathy_test(tmp_path).captions) == [("a dog",)]


def test_the_self_check_on_the_command_line(model, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.delenv("COCO", raising=False)
    assert main(["eval", "--selfcheck"]) == 1
    told = capsys.readouterr().err
    assert "The self-check measures on sets that are not here: give --imagenet" in told and told.count("\n") == 1
    assert main(["eval", "--selfcheck", "--coco", str(tmp_path / "nowhere")]) == 1
    assert "is no folder" in capsys.readouterr().err
    save_full_clip(model, tmp_path / "tiny.safetensors")
    swapped = ["--imagenet", str(sets["coco"]), "--model", str(tmp_path / "tiny.safetensors")]
    assert main(["eval", "--selfcheck", *swapped]) == 1
    assert "has no subfolder of pictures for each class" in capsys.readouterr().err
    arguments = ["--imagenet", str(sets["imagenet"]), "--model", str(tmp_path / "tiny.safetensors")]
    assert main(["eval", "--selfcheck", *arguments]) == 1
    assert "--imagenet has 32 pictures, and the published figures are those of 50,000" in capsys.readouterr().err
    small = [dataclasses.replace(figure, pictures=SIZES[figure.on]) for figure in PUBLISHED]
    monkeypatch.setitem(selfcheck.__kwdefaults__, "published", small)
    assert main(["eval", "--selfcheck", *arguments, "--json", str(tmp_path / "check.json")]) == 1
    assert "published figures are not reached" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is False
    assert main(["eval", "--model", "x"]) == 1 and "eval needs --model and --data" in capsys.readouterr().err
    for more in (["--html", "x.html"], ["--baseline", "x"], ["--typographic"], ["--templates", "none"]):
        assert main(["eval", "--selfcheck", *arguments, *more]) == 1
        assert f"does nothing with {more[0]}; leave it out" in capsys.readouterr().err
