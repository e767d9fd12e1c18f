"""How image files become squares: decoding, resizing, cropping and augmentation."""

import io
import random

import numpy
import pytest
import torch
from image_folders import load_image
from image_runs import RANDOM, blocks, blocks_folder, run
from PIL import Image, features

from clip_finetune.engine import TrainConfig, UserError, load_dataset
from clip_finetune.engine.data.images.decoding import BrokenImage, decode, decode_plain_jpeg
from clip_finetune.engine.data.images.transforms import Transform


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(blocks_folder(tmp_path_factory.mktemp("data") / "noise"))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(120, 80), (33, 61), (97, 97)])
def test_the_fast_decoder_gives_pillows_bits(tmp_path, size, subsampling, progressive):
    for quality in (30, 75, 95):
        file = tmp_path / f"{quality}.jpg"
        blocks(*size).save(file, quality=quality, subsampling=subsampling, progressive=progressive)
        theirs = torch.from_numpy(numpy.array(decode(file))).permute(2, 0, 1)
        assert torch.equal(decode_plain_jpeg(file), theirs)


def test_anything_but_a_plain_jpeg_is_left_to_pillow(tmp_path):
    picture, exif = blocks(60, 40), Image.Exif()
    exif[0x0112] = 6
    picture.convert("L").save(tmp_path / "grey.jpg")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "other.png")
    (tmp_path / "text.jpg").write_text("hello")
    for file in tmp_path.iterdir():
        assert decode_plain_jpeg(file) is None
    fast = Transform(image_size=32, resize_backend="fast")
    for name in ("grey.jpg", "cmyk.jpg", "turned.jpg", "other.png"):
        apart = fast.load(tmp_path / name).int() - load_image(tmp_path / name, 32).int()
        assert apart.abs().max() <= 2


def test_fast_pixels_differ_from_pillows_in_less_than_one_value_in_a_hundred(shared_data):
    different = []
    for file in sorted((shared_data / "flickr8k/images").glob("*.jpg"))[:40]:
        apart = (Transform(image_size=224, resize_backend="fast").load(file).int() - load_image(file, 224).int()).abs()
        different.append((apart > 0).float().mean().item())
        assert apart.max() <= 3
    assert sum(different) / len(different) < 0.01


@pytest.mark.parametrize("cut", [2, 300, 0.5, -2, -1])
def test_both_backends_refuse_a_cut_jpeg_for_the_same_reason(tmp_path, cut):
    blocks(120, 90).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: cut if isinstance(cut, int) else len(content) // 2])
    reasons = []
    for resize in ("exact", "fast"):
        with pytest.raises(BrokenImage) as refusal:
            Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.jpg")
        reasons.append(str(refusal.value))
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "avif"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100)
    pixel = load_image(tmp_path / f"a.{kind}", 32)[:, 16, 16].int()
    assert pixel[0] > 240 and pixel[1:].max() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_chosen_background(tmp_path, mode):
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    for background, expected in (("white", [255] * 3), ("#102030", [16, 32, 48])):
        for resize in ("exact", "fast"):
            image = Transform(image_size=32, background=background, resize_backend=resize).load(tmp_path / "a.png")
            assert image[:, 16, 16].tolist() == expected


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_pad_shows_the_whole_image_on_the_background_and_squash_distorts_it(tmp_path, resize):
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (60, 0, 80, 40))
    wide.save(tmp_path / "a.png")
    padded = Transform(image_size=32, resize_mode="pad", background="lime", resize_backend=resize).load(
        tmp_path / "a.png"
    )
    assert padded[:, 4, 16].tolist() == padded[:, 28, 16].tolist() == [0, 255, 0]
    assert padded[:, 16, 2].tolist() == [255, 0, 0] and padded[:, 16, 30].tolist() == [0, 0, 255]
    squashed = Transform(image_size=32, resize_mode="squash", resize_backend=resize).load(tmp_path / "a.png")
    assert squashed[:, 1, 2].tolist() == [255, 0, 0] and squashed[:, 30, 30].tolist() == [0, 0, 255]
    middle = Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.png")
    assert middle[:, 16, 2].tolist() == [255, 0, 0] and middle[:, 16, 29].tolist() == [255, 0, 0]


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_augmentation_depends_on_the_rng_alone(tmp_path, resize):
    blocks(300, 200).save(tmp_path / "a.jpg")
    transform = Transform(image_size=32, resize_backend=resize, **RANDOM)
    seen = {transform.load(tmp_path / "a.jpg", random.Random(seed)).numpy().tobytes() for seed in range(20)}
    assert len(seen) == 20
    again = transform.load(tmp_path / "a.jpg", random.Random(3))
    assert again.shape == (3, 32, 32) and torch.equal(again, transform.load(tmp_path / "a.jpg", random.Random(3)))
    assert torch.equal(
        transform.deterministic.load(tmp_path / "a.jpg"),
        Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.jpg"),
    )


def test_a_random_crop_covers_at_least_min_crop_area():
    from clip_finetune.engine.data.images.transforms import _random_box

    chance = random.Random(0)
    for share in (0.2, 0.5, 0.9):
        parts = [_random_box(300, 240, share, chance) for _ in range(500)]
        shares = [width * height / (300 * 240) for _, _, width, height in parts]
        assert min(shares) > share * 0.98 and max(shares) <= 1 and len(set(parts)) > 100
        assert all(left + width <= 300 and top + height <= 240 for left, top, width, height in parts)
    assert _random_box(1000, 10, 1.0, chance) == (493, 0, 13, 10)


def test_horizontal_flip_mirrors_half_of_the_images_and_is_off_by_default(data):
    transform = Transform(image_size=32, horizontal_flip=True)
    plain = Transform(image_size=32).load(data.path(0))
    mirrored = 0
    for seed in range(200):
        found = transform.load(data.path(0), random.Random(seed))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(2))
        mirrored += torch.equal(found, plain.flip(2))
    assert 70 < mirrored < 130 and TrainConfig().images.horizontal_flip is False


def test_a_background_that_is_not_a_colour_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="background is 'snow white'"):
        run(data, tmp_path / "run", background="snow white")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_an_open_file_gives_the_same_pixels_as_its_path_and_stays_open(tmp_path, form, resize):
    blocks(40, 60).save(tmp_path / "a", form)
    file, transform = io.BytesIO((tmp_path / "a").read_bytes()), Transform(image_size=32, resize_backend=resize)
    for _ in range(2):
        assert torch.equal(transform.load(file), transform.load(tmp_path / "a"))


def test_an_image_without_read_permission_gives_the_reason(ordinary_user):
    folder, rights = ordinary_user
    blocks(40, 40).save(folder / "a.jpg")
    load_image(folder / "a.jpg", 32)
    (folder / "a.jpg").chmod(0)
    with rights(), pytest.raises(BrokenImage, match="Permission denied"):
        load_image(folder / "a.jpg", 32)
