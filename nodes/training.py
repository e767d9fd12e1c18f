"""The two training nodes: the same engine, with and without GmP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui

from ..engine.clip.full_clip import FullCLIP
from ..engine.data.dataset import ClipDataset
from ..engine.report.charts import loss_chart
from ..engine.report.tables import time_words
from ..engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, Preset, TrainConfig, all_settings
from ..engine.train.run.folder import ON_EXISTING
from ..engine.train.run.results import Progress
from ..engine.train.trainer import train as run_training
from .host import folders
from .host.device import check_cancelled, exclusive_device, torch_device
from .host.display import Display, to_tensor
from .schema import node_schema, setting_input, widget
from .sockets import Dataset, FullClip, TrainOptions, TrainOptionsSocket

_WIDGETS = ("epochs", "learning_rate", "batch_size", "towers", "loss", "seed")


def _schema(node_id: str, display_name: str, description: str, presets: Mapping[str, Preset]) -> io.Schema:
    preset_help = "\n".join(f"{name}: {preset.description}" for name, preset in presets.items())
    return node_schema(
        node_id,
        display_name,
        "train",
        f"{description} A cancelled training continues when you queue it again.",
        aliases="fine tune clip, training, text encoder, contrastive",
        inputs=[
            FullClip.Input("full_clip"),
            Dataset.Input("train", tooltip="Images and captions to train on."),
            Dataset.Input(
                "validation",
                optional=True,
                tooltip="Images that are not trained on. They decide which epoch gave the best model; without them the "
                "last one counts.",
            ),
            TrainOptionsSocket.Input(
                "options", optional=True, tooltip="More settings, from the nodes called Train CLIP: …"
            ),
            widget("run_name", "my_clip", "Name of the training's folder in output/clip_finetune."),
            io.Combo.Input(
                "preset",
                options=list(presets),
                default=DEFAULT_PRESET,
                optional=True,
                extra_dict={"clip_finetune_presets": {name: dict(preset.values) for name, preset in presets.items()}},
                tooltip=f"Fills in the widgets below.\n{preset_help}",
            ),
            *(setting_input(all_settings()[name]) for name in _WIDGETS),
            widget(
                "if_run_exists",
                "auto",
                "If there is a run of this name. auto: continue it if the settings are the same, else use a "
                "new folder (my_clip_2). resume: continue it. restart: delete it. fail: stop.",
                choices=ON_EXISTING,
                advanced=True,
            ),
        ],
        outputs=dict(full_clip=FullClip, chart=io.Image, run_folder=io.String),
        is_output_node=True,
    )


def _config(
    preset_name: str, preset: Preset, options: TrainOptions, widgets: Mapping[str, Any], *, gmp: bool
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the config and where each value came from. Widgets and options win over the preset, which only supplies
    what an API prompt leaves out."""
    layers = {f"preset {preset_name}": preset.values, "option node": options.flat(), "widget": widgets}
    values = {name: value for layer in layers.values() for name, value in layer.items()}
    origins = {name: origin for origin, layer in layers.items() for name in layer}
    return TrainConfig.from_flat(**values, gmp=gmp), origins


def _train(
    cls: type[io.ComfyNode],
    config: TrainConfig,
    origins: Mapping[str, str],
    datasets: tuple[FullCLIP, ClipDataset, ClipDataset | None],
    run_name: str,
    if_run_exists: str,
) -> io.NodeOutput:
    display = Display(cls)
    with exclusive_device():
        result = run_training(
            *datasets,
            config,
            run_folder=folders.run_folder(run_name),
            device=torch_device(),
            on_existing=if_run_exists,
            origins=origins,
            cache_folder=folders.image_cache_folder(),
            on_note=display.note,
            on_progress=lambda progress: _show(display, progress),
            check_cancelled=check_cancelled,
        )
    folder = folders.relative_to_output(result.run_folder)
    report = f" Details: {folder}/{result.report_file.name} in the output folder." if result.report_file else ""
    display.note(f"Done: the model of step {result.best_step} of {result.total_steps}.{report}")
    chart = to_tensor(loss_chart(result.steps, result.validations, title=result.run_folder.name))
    return io.NodeOutput(result.full_clip, chart, folder, ui=ui.PreviewImage(chart, cls=cls))


def _show(display: Display, progress: Progress) -> None:
    """Show the loss chart and a line of numbers while training."""
    title = f"step {progress.step} of {progress.total_steps}"
    display.preview(
        progress.step, progress.total_steps, lambda: loss_chart(progress.steps, progress.validations, title=title)
    )
    if progress.steps:
        last = progress.steps[-1]
        display.status(
            f"step {progress.step}/{progress.total_steps}, loss {last['loss']:.3f}, "
            f"{last['pairs_per_second']:.1f} pairs/s, {time_words(progress.seconds_left)} left"
        )


class _TrainingNode(io.ComfyNode):
    """What both training nodes do; each has its own presets."""

    PRESETS: Mapping[str, Preset]
    GMP: bool

    @classmethod
    def execute(
        cls,
        full_clip: FullCLIP,
        train: ClipDataset,
        validation: ClipDataset | None = None,
        options: TrainOptions | None = None,
        run_name: str = "my_clip",
        preset: str = DEFAULT_PRESET,
        if_run_exists: str = "auto",
        **widgets: Any,
    ) -> io.NodeOutput:
        config, origins = _config(preset, cls.PRESETS[preset], options or TrainOptions(), widgets, gmp=cls.GMP)
        return _train(cls, config, origins, (full_clip, train, validation), run_name, if_run_exists)


class TrainCLIP(_TrainingNode):
    PRESETS, GMP = PRESETS, False

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema("TrainCLIP", "Train CLIP", "Fine-tunes a CLIP model on captioned images.", cls.PRESETS)


class TrainCLIPGmP(_TrainingNode):
    PRESETS, GMP = GMP_PRESETS, True

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "TrainCLIPGmP",
            "Train CLIP (GmP)",
            "Fine-tunes a CLIP model with Geometric Parameterization (GmP): the length and the direction of each MLP "
            "weight row are trained separately. Put Fold GmP behind it.",
            cls.PRESETS,
        )


NODES = [TrainCLIP, TrainCLIPGmP]
