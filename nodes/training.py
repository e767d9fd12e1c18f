"""The two training nodes: the same engine, with and without GmP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui

from ..engine.report.charts import loss_chart
from ..engine.report.tables import time_words
from ..engine.settings import SettingInfo
from ..engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, Preset, TrainConfig, all_settings
from ..engine.train.run.folder import ON_EXISTING
from ..engine.train.run.results import Progress
from ..engine.train.trainer import train
from . import host
from .sockets import CATEGORY, Dataset, FullClip

_IF_EXISTS = (
    "Another run of this name: auto goes on with the same run and gives a changed one a new folder; resume, "
    "restart (deletes the old run) and fail are explicit."
)


def _setting(info: SettingInfo):
    """A widget for one setting. Optional: what an API prompt leaves out comes from the preset."""
    common = dict(default=info.default, optional=True, tooltip=info.help, advanced=bool(info.section) or None)
    if info.choices:
        return io.Combo.Input(info.name, options=list(info.choices), **common)
    if info.kind is str:
        return io.String.Input(info.name, **common)
    if info.kind is bool:
        return io.Boolean.Input(info.name, **common)
    bounds = {key: value for key in ("min", "max", "step") if (value := getattr(info, key)) is not None}
    if info.kind is int:
        fixed = {"control_after_generate": False} if info.name == "seed" else {}
        return io.Int.Input(info.name, **bounds, **fixed, **common)
    return io.Float.Input(info.name, **bounds, **common)


def _settings(*, advanced: bool):
    """Widgets for all settings but `gmp`, which is a node of its own."""
    return [_setting(info) for info in all_settings().values() if info.name != "gmp" and bool(info.section) == advanced]


def _schema(node_id: str, display_name: str, description: str, presets: Mapping[str, Preset]):
    carried = {name: dict(preset.values) for name, preset in presets.items()}
    words = "\n".join(f"{name}: {preset.description}" for name, preset in presets.items())
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        search_aliases=["fine-tune", "finetune", "training", "contrastive"],
        inputs=[
            FullClip.Input("full_clip"),
            Dataset.Input("train"),
            Dataset.Input("validation", optional=True, tooltip="Without it the last weights count as the best."),
            io.String.Input(
                "run_name", default="my_clip", optional=True, tooltip="The run's folder in output/clip_finetune."
            ),
            io.Combo.Input(
                "preset",
                options=list(presets),
                default=DEFAULT_PRESET,
                optional=True,
                extra_dict={"clip_finetune_presets": carried},
                tooltip=f"Choosing one writes its values into the widgets below.\n{words}",
            ),
            *_settings(advanced=False),
            io.Combo.Input(
                "if_run_exists",
                options=list(ON_EXISTING),
                default="auto",
                optional=True,
                advanced=True,
                tooltip=_IF_EXISTS,
            ),
            *_settings(advanced=True),
        ],
        outputs=[
            FullClip.Output(display_name="full_clip"),
            io.Image.Output(display_name="chart"),
            io.String.Output(display_name="run_folder"),
        ],
        hidden=[io.Hidden.unique_id],
        is_output_node=True,
    )


def _train(cls, presets, gmp, full_clip, train_set, validation, run_name, preset, if_run_exists, given: dict[str, Any]):
    values = dict(presets[preset].values) | given
    origins = dict.fromkeys(presets[preset].values, f"preset {preset}") | dict.fromkeys(given, "widget")
    config = TrainConfig.from_flat(**values, gmp=gmp)
    display = host.Display(cls.hidden.unique_id)

    def show(progress: Progress) -> None:
        display.picture(
            progress.step,
            progress.total_steps,
            lambda: loss_chart(
                progress.steps, progress.validations, title=f"step {progress.step} of {progress.total_steps}"
            ),
        )
        if progress.steps:
            last = progress.steps[-1]
            display.status(
                f"step {progress.step}/{progress.total_steps}, loss {last['loss']:.3f}, "
                f"{last['pairs_per_second']:.1f} pairs/s, {time_words(progress.seconds_left)} left"
            )

    with host.whole_device():
        result = train(
            full_clip,
            train_set,
            validation,
            config,
            run_folder=host.run_folder(run_name),
            device=host.device(),
            on_existing=if_run_exists,
            origins=origins,
            cache_folder=host.image_cache_folder(),
            on_note=display.say,
            on_progress=show,
            check_cancelled=host.check_cancelled,
        )
    folder = host.relative_to_output(result.run_folder)
    report = f" All about it: {folder}/{result.report_file.name} in the output folder." if result.report_file else ""
    display.say(f"Done: the model of step {result.best_step} of {result.total_steps}.{report}")
    chart = host.image_tensor(loss_chart(result.steps, result.validations, title=result.run_folder.name))
    return io.NodeOutput(result.full_clip, chart, folder, ui=ui.PreviewImage(chart, cls=cls))


class TrainCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            "TrainCLIP",
            "Train CLIP",
            "Fine-tunes a CLIP on captioned pictures. A cancelled training goes on when it is queued again.",
            PRESETS,
        )

    @classmethod
    def execute(
        cls, full_clip, train, validation=None, run_name="my_clip", preset=DEFAULT_PRESET, if_run_exists="auto", **given
    ):
        return _train(cls, PRESETS, False, full_clip, train, validation, run_name, preset, if_run_exists, given)


class TrainCLIPGmP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return _schema(
            "TrainCLIPGmP",
            "Train CLIP (GmP)",
            "Fine-tunes a CLIP with Geometric Parameterization: length and direction of each MLP row are trained "
            "apart. Fold the result with Fold GmP. A cancelled training goes on when it is queued again.",
            GMP_PRESETS,
        )

    @classmethod
    def execute(
        cls, full_clip, train, validation=None, run_name="my_clip", preset=DEFAULT_PRESET, if_run_exists="auto", **given
    ):
        return _train(cls, GMP_PRESETS, True, full_clip, train, validation, run_name, preset, if_run_exists, given)


NODES = [TrainCLIP, TrainCLIPGmP]
