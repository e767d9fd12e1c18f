"""Captioned images that the demo draws: coloured shapes, with captions that state true facts.

Each image shows one to four shapes of one kind. Every caption names colour and shape, and some combinations of the two
are reserved for the held-out split, so that no caption is in both splits.
"""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

Style = Literal["plain", "shifted"]
Split = Literal["train", "held_out"]

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 208, 30),
    "purple": (140, 60, 180),
    "orange": (245, 135, 30),
    "pink": (245, 140, 190),
    "cyan": (50, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"white": (245, 245, 245), "black": (18, 18, 18), "gray": (128, 128, 128), "brown": (110, 75, 45)}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 0.10, "medium": 0.14, "large": 0.19}
COUNTS = ("one", "two", "three", "four")
POSITIONS = {
    "in the top left": (0.28, 0.28),
    "in the top right": (0.72, 0.28),
    "in the middle": (0.5, 0.5),
    "in the bottom left": (0.28, 0.72),
    "in the bottom right": (0.72, 0.72),
}
IMAGE_SIZE = 48
HELD_OUT_EVERY = 4  # one in so many combinations of colour and shape


class Facts(NamedTuple):
    """What an image shows."""

    colour: str
    shape: str
    number: int
    size: str
    texture: str
    position: str
    background: str


def combinations(split: Split) -> list[tuple[str, str]]:
    """Return the combinations of colour and shape of a split; every colour and every shape is in both splits."""
    pairs = []
    for row, colour in enumerate(COLOURS):
        for column, shape in enumerate(SHAPES):
            held_out = (row + column) % HELD_OUT_EVERY == 0
            if held_out == (split == "held_out"):
                pairs.append((colour, shape))
    return pairs


def captions_of(facts: Facts) -> list[str]:
    """Return all captions of an image that shows these facts."""
    noun = facts.shape if facts.number == 1 else {"cross": "crosses"}.get(facts.shape, facts.shape + "s")
    number = COUNTS[facts.number - 1]
    detailed = f"{number} {facts.size} {facts.texture} {facts.colour} {noun} {facts.position}"
    return [
        f"{detailed} on a {facts.background} background",
        f"a picture of {number} {facts.colour} {noun}",
        f"{facts.texture} {facts.colour} {noun} on {facts.background}",
        f"{facts.size} {facts.colour} {noun} {facts.position}",
    ]


def draw_demo_dataset(folder: Path, *, count: int, seed: int, style: Style, split: Split) -> Path:
    """Draw `count` images into `folder`/images, write their captions to `folder`/labels.json, and return `folder`."""
    labels = {}
    for index in range(count):
        facts, rng = _facts(index, seed, style, split)
        name = f"images/{index:04}.png"
        _save(folder / name, draw(facts, style, rng))
        labels[name] = captions_of(facts)
    (folder / "labels.json").write_text(json.dumps(labels, indent=1), encoding="utf-8")
    return folder


def draw_demo_classes(folder: Path, *, count: int, seed: int, style: Style, split: Split) -> Path:
    """Draw the same images as `draw_demo_dataset`, in a subfolder for each combination of colour and shape."""
    for index in range(count):
        facts, rng = _facts(index, seed, style, split)
        _save(folder / f"{facts.colour} {facts.shape}" / f"{index:04}.png", draw(facts, style, rng))
    return folder


def _save(path: Path, image: Image.Image) -> None:
    """Write the image unless it is there already: a new file time would make it other data for a run."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    if path.is_file() and path.read_bytes() == encoded.getvalue():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.getvalue())


def _facts(index: int, seed: int, style: Style, split: Split) -> tuple[Facts, random.Random]:
    rng = random.Random(f"{seed} {style} {split} {index}")
    pairs = combinations(split)
    colour, shape = pairs[index % len(pairs)]
    facts = Facts(
        colour,
        shape,
        rng.randint(1, 4),
        rng.choice(list(SIZES)),
        rng.choice(TEXTURES),
        rng.choice(list(POSITIONS)),
        rng.choice(list(BACKGROUNDS)),
    )
    return facts, rng


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(facts: Facts, style: Style, rng: random.Random) -> Image.Image:
    """Draw an RGB image. The shifted style is a faded, tilted outline drawing on noisy paper, slightly blurred."""
    from PIL import Image, ImageFilter

    scale = 4  # drawn larger and reduced, for smooth edges
    side = IMAGE_SIZE * scale
    ground, ink = BACKGROUNDS[facts.background], _vary(COLOURS[facts.colour], 14, rng)
    image = Image.new("RGB", (side, side), _vary(ground, 8, rng))
    mask = _shapes_mask(facts, style, side, rng)
    image.paste(_ink(facts, style, ink, side), (0, 0), mask)
    if style == "shifted":
        image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
        image = Image.blend(image, Image.new("RGB", image.size, (170, 130, 70)), 0.45)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    if style == "shifted":
        image = _noise(image.filter(ImageFilter.GaussianBlur(0.6)), rng)
    return image


def _vary(colour: tuple[int, int, int], by: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-by, by))) for value in colour)


def _noise(image: Image.Image, rng: random.Random) -> Image.Image:
    import numpy
    from PIL import Image

    grain = numpy.random.default_rng(rng.getrandbits(32)).normal(0, 22, (*image.size, 3))
    return Image.fromarray((numpy.asarray(image) + grain).clip(0, 255).astype("uint8"))


def _shapes_mask(facts: Facts, style: Style, side: int, rng: random.Random) -> Image.Image:
    """Return a greyscale mask of the shapes; in the shifted style, their outlines with a faint filling."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    radius = SIZES[facts.size] * side
    for x, y in _centres(facts, side, radius, rng):
        turn = rng.uniform(-0.25, 0.25)
        outline = [(x + radius * px, y + radius * py) for px, py in _outline(facts.shape, turn)]
        thick = max(2, round(radius * 0.22))
        if facts.shape == "ring":
            thick = round(radius * 0.42)
        fill = 255 if style == "plain" and facts.shape != "ring" else 70 if facts.shape != "ring" else None
        pen.polygon(outline, fill=fill, outline=255, width=thick if style == "shifted" or facts.shape == "ring" else 1)
    return mask


def _centres(facts: Facts, side: int, radius: float, rng: random.Random) -> list[tuple[float, float]]:
    """Return centres for the shapes around the named position, apart from each other and inside the image."""
    px, py = POSITIONS[facts.position]
    spread = min(radius * 1.15, side * 0.17) if facts.number > 1 else 0.0
    start = rng.uniform(0, 2 * math.pi)
    centres = []
    for number in range(facts.number):
        angle = start + 2 * math.pi * number / facts.number
        x, y = (
            middle * side + spread * wave + rng.uniform(-0.02, 0.02) * side
            for middle, wave in ((px, math.cos(angle)), (py, math.sin(angle)))
        )
        edge = radius * 1.02
        centres.append((min(max(x, edge), side - edge), min(max(y, edge), side - edge)))
    return centres


def _outline(shape: str, turn: float) -> list[tuple[float, float]]:
    """Return the shape's corners around (0, 0), roughly within the unit circle."""
    if shape in ("circle", "ring"):
        polar = [(1.0, 2 * math.pi * step / 48) for step in range(48)]
    elif shape == "square":
        polar = [(1.0, math.pi / 4 + math.pi / 2 * step) for step in range(4)]
    elif shape == "triangle":
        polar = [(1.0, -math.pi / 2 + 2 * math.pi / 3 * step) for step in range(3)]
    elif shape == "star":
        polar = [(1.0 if step % 2 == 0 else 0.42, -math.pi / 2 + math.pi / 5 * step) for step in range(10)]
    else:  # a cross
        arm = 0.32
        corners = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
        corners += [(-x, -y) for x, y in corners]
        polar = [(math.hypot(x, y), math.atan2(y, x)) for x, y in corners]
    return [(length * math.cos(angle + turn), length * math.sin(angle + turn)) for length, angle in polar]


def _ink(facts: Facts, style: Style, ink: tuple[int, ...], side: int) -> Image.Image:
    """Return a square of the shapes' colour and texture, which the mask cuts the shapes out of."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), ink)
    pen = ImageDraw.Draw(image)
    dark = tuple(value * 45 // 100 for value in ink)
    step = side // 22 if style == "plain" else side // 14
    if facts.texture == "striped":
        for offset in range(0, 2 * side, step):
            pen.line((offset, 0, offset - side, side), fill=dark, width=step // 3)
    elif facts.texture == "dotted":
        dot = step * 0.28
        for x in range(0, side, step):
            for y in range(0, side, step):
                pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=dark)
    return image
