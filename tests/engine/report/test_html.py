"""Whatever is put into a page is text: escaped, cut, and never too large."""

import numpy
import pytest
from jinja2 import UndefinedError
from pages import EVIL, Read, read
from PIL import Image

from clip_finetune.engine.report.evaluation_report import (
    ComparisonSection,
    EvaluationPage,
    Measurement,
    evaluation_report,
)
from clip_finetune.engine.report.html import render


def image(mode="RGB"):
    return Image.new(mode, (8, 8))


def test_everything_that_is_put_into_a_page_is_escaped():
    measurement = Measurement(
        sentence=EVIL,
        chart=image("L"),
        remarks=[EVIL, f"two\n{EVIL}"],
        tables={EVIL: [{EVIL: EVIL}]},
        examples_heading=EVIL,
        examples=[(image(), EVIL)],
    )
    page = EvaluationPage(
        dataset=EVIL,
        rows=[{EVIL: EVIL}],
        measurements=[measurement],
        comparisons=[ComparisonSection(EVIL, [EVIL, EVIL], image(), {EVIL: [{EVIL: EVIL}]})],
        facts={EVIL: {EVIL: EVIL}},
        notes=[EVIL],
        samples=[(image(), EVIL)],
    )
    found = Read(evaluation_report(page))
    # Title and heading, measurement (8), table of models (2), comparison (6), facts (3), note, sample.
    assert found.text.count(EVIL) == 2 + 8 + 2 + 6 + 3 + 1 + 1 and len(found.images) == 4


def page_of(**changes):
    return evaluation_report(EvaluationPage(**({"dataset": "data", "rows": [], "measurements": []} | changes)))


def test_damaged_names_and_long_texts_do_not_break_a_page(tmp_path):
    rows = [{"row": str(number)} for number in range(10_000)]
    text = page_of(dataset="\udcff.png", rows=rows, notes=["x" * 100_000])
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    found = read(tmp_path / "page.html")
    assert "The first 500 of 10000 rows." in found.text and len(text) < 50_000 and "?.png" in found.text


def test_images_that_cannot_be_compressed_are_left_out_before_the_page_is_too_large(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=numpy.uint8)
    noise = Image.fromarray(pixels)
    text = page_of(measurements=[Measurement("noise", noise)] * 20, samples=[(noise, "noise")] * 200)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    found = read(tmp_path / "page.html")
    assert "(There is no room left for this image.)" in found.text and found.images


def test_an_ampersand_is_escaped_once_and_an_empty_section_is_not_there():
    text = page_of(notes=["a & b"])
    assert "<p>a &amp; b</p>" in text and "<h2>Notes</h2>" in text
    assert "<h2>" not in page_of() and "<section>" not in page_of()


def test_a_value_that_a_template_lacks_is_an_error_and_no_gap():
    with pytest.raises(UndefinedError):
        render("evaluation.html", title="x")
