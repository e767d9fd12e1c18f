"""Charts and tables from any numbers."""

from PIL import Image

from clip_finetune.engine.report.charts import against_baseline, bar_chart, loss_chart
from clip_finetune.engine.report.image_charts import chart_with_sheet, ranking_chart
from clip_finetune.engine.report.tables import table, time_words


def test_charts_of_any_numbers_never_have_an_alpha_channel():
    step = {"kind": "step", "step": 1, "loss": 1.0, "learning_rate": {"all": 1e-6}}
    for steps in ([], [step], [step] * 3, [step | {"step": n, "loss": float("nan")} for n in range(4)]):
        for validations in ([], [{"step": 0, "loss": 2.0}]):
            assert loss_chart(steps, validations).mode == "RGB"
    assert (
        bar_chart({}).mode == bar_chart({"a": {"x": 0.0}}).mode == bar_chart({"a": {"x": 1.0, "y": 0.5}}).mode == "RGB"
    )


def test_a_longer_run_changes_its_chart():
    lines = [{"step": n, "loss": 5 / n, "learning_rate": {"all": 1e-6}} for n in range(1, 30)]
    assert loss_chart(lines[:10], []).tobytes() != loss_chart(lines, []).tobytes()


def test_a_title_says_better_worse_or_as_before():
    assert against_baseline("Accuracy", 0.5, None) == "Accuracy: 50.0%"
    assert against_baseline("Accuracy", 0.5, 0.4) == "Accuracy: 50.0%, 10.0 points better than the baseline"
    assert against_baseline("Accuracy", 0.3, 0.4) == "Accuracy: 30.0%, 10.0 points worse than the baseline"
    assert against_baseline("Accuracy", 0.4, 0.4) == "Accuracy: 40.0%, as before"


def test_durations_in_words():
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


def test_charts_with_images_are_rgb_and_grow_with_what_they_show():
    picture = Image.new("RGB", (30, 20), "red")
    groups = {"right, clean": {"baseline": 0.5, "model": 0.6}, "the word wins": {"baseline": 1.0, "model": 0.0}}
    bare = chart_with_sheet(bar_chart(groups), [], "those:")
    sheet = chart_with_sheet(bar_chart(groups, title="t"), [(picture, "a $caption_")] * 8, "those:")
    assert bare.mode == sheet.mode == "RGB" and sheet.height > bare.height + 400 and sheet.width == bare.width
    assert bar_chart({}).mode == "RGB"
    plain_chart = bar_chart(groups)
    whiskers = bar_chart(groups, intervals={"right, clean": {"model": (0.5, 0.7)}})
    assert plain_chart.tobytes() != whiskers.tobytes()
    confused = bar_chart(groups, confused={"model": [("a", "b", 3)], "baseline": []})
    assert confused.height > plain_chart.height
    one = ranking_chart(picture, ["a $x_y^"], {"model": [1.0]}, {"model": [0.3]})
    shares = {name: [0.05] * 20 for name in ("model", "baseline")}
    many = ranking_chart(picture, ["text " * 40] * 20, shares, shares)
    assert one.mode == many.mode == "RGB" and many.height > one.height
