"""Words that are drawn into images."""

import random

import pytest
import torch
from PIL import ImageDraw

from clip_finetune.engine.evaluate.typographic.drawing import can_be_drawn, write_word


def plain(side=64, shade=120):
    return torch.full((3, side, side), shade, dtype=torch.uint8)


@pytest.mark.parametrize(
    "word", ["dog", "great white shark", "Übersee", "собака", "a" * 60, "aircraft carrier, flattop"]
)
def test_a_word_is_drawn_the_same_for_the_same_seed(word):
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


def test_words_differ_in_size_position_font_and_contrast():
    drawn = [write_word(plain(), "dog", random.Random(number)) for number in range(30)]
    assert len({picture.numpy().tobytes() for picture in drawn}) == 30
    heights = {int((picture != plain()).any(0).any(1).sum()) for picture in drawn}
    contrasts = {int(picture.max()) - int(picture.min()) for picture in drawn}
    assert len(heights) > 5 and len(contrasts) > 2


def test_letters_that_no_font_has_are_known():
    assert can_be_drawn("dog") and can_be_drawn("кот") and not can_be_drawn("犬") and not can_be_drawn(" ")
