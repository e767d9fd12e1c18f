"""Decoding: every kind of image becomes RGB, and damaged ones say what is wrong."""

import pytest
import torch
from image_folders import load_image, plain_image
from PIL import Image

from clip_finetune.engine.data.images.decoding import BrokenImage, normalize
from clip_finetune.engine.data.images.folder_tree import image_suffixes


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (77, 61), (224, 224), (1000, 31)])
def test_pixels_equal_open_clips_transform(tmp_path, size):
    import open_clip

    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    theirs = open_clip.image_transform(64, is_train=False)(Image.open(tmp_path / "a.png"))
    ours = normalize(load_image(tmp_path / "a.png", 64)[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA", "RGBA", "F"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    file = tmp_path / {"CMYK": "a.jpg", "F": "a.tiff"}.get(mode, "a.png")
    if mode == "I;16":
        Image.new("I;16", (40, 40), 50_000).save(file)
    else:
        plain_image(file, (40, 40), (200, 200, 200), mode)
    found = load_image(file, 32)
    assert found.shape == (3, 32, 32) and found.dtype == torch.uint8
    expected = 50_000 / 256 if mode == "I;16" else 255 if mode == "1" else 200
    if mode not in ("1",):
        assert (found.float() - expected).abs().max() <= 8


def test_transparency_becomes_white_and_exif_orientation_is_applied(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", 32).min() == 255
    upright = Image.new("RGB", (32, 64), "red")
    upright.paste("blue", (0, 32, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", 32)
    assert turned[2, 4, 16] > 200 and turned[0, -4, 16] > 200


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "gone"])
def test_a_broken_image_says_what_is_wrong(tmp_path, damage):
    file = plain_image(tmp_path / "a.jpg", (200, 200))
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": file.read_bytes()[:400], "text": b"hello" * 50}[damage])
    with pytest.raises(BrokenImage) as refusal:
        load_image(file, 32)
    assert str(refusal.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="too large"):
        load_image(plain_image(tmp_path / "a.png", (100, 100)), 32)


def test_sixteen_bits_of_grey_stay_grey(tmp_path):
    """A PGM of 16 bits, written by hand: 0x7600 of 0xffff is 118 of 255."""
    (tmp_path / "a.pgm").write_bytes(b"P5 40 40 65535\n" + b"\x76\x00" * 1600)
    assert set(load_image(tmp_path / "a.pgm", 32).flatten().tolist()) == {118}


def test_a_very_narrow_image_costs_no_memory(tmp_path):
    Image.new("RGB", (1, 20000), (9, 90, 200)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 32)
    assert image.shape == (3, 32, 32) and image[:, 16, 16].tolist() == [9, 90, 200]


def test_postscript_is_no_image_format_because_reading_it_runs_a_program():
    assert not {".eps", ".ps"} & image_suffixes() and ".png" in image_suffixes()
