"""CLIP fine-tuning without ComfyUI: open, train, fold, export, merge, blend and evaluate."""

from .clip.blend import blend
from .clip.exports import export_text_encoder, export_vision_encoder, save_full_clip
from .clip.full_clip import FullCLIP
from .clip.gmp import fold_gmp, to_gmp
from .clip.huggingface import save_huggingface
from .clip.load import load_full_clip
from .clip.lora import export_lora
from .clip.merge import merge_text_encoder, merge_vision_encoder, transplant_tower
from .clip.network import build_network
from .clip.variants.long_clip import stretch_context
from .data.dataset import ClipDataset
from .data.load import combine_datasets, load_dataset
from .data.splits import split_dataset
from .data.tools.convert import convert_captions
from .errors import UserError
from .evaluate.calibration import calibrate_logit_scale
from .evaluate.comparison import compare_full_clips
from .evaluate.drift import conditioning_drift, weight_drift
from .evaluate.geometry import eval_geometry
from .evaluate.gmp_form import gmp_form
from .evaluate.ranking import rank_captions
from .evaluate.retrieval import eval_retrieval
from .evaluate.sweep import blend_sweep
from .evaluate.typographic.attack import eval_typographic
from .evaluate.zero_shot import eval_zero_shot
from .train.config import TrainConfig
from .train.run.results import TrainResult

# Last, and eagerly: importing the package `train` binds its name here, and this line rebinds it to the function.
from .train.trainer import train

__all__ = [
    "ClipDataset",
    "FullCLIP",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "blend",
    "blend_sweep",
    "build_network",
    "calibrate_logit_scale",
    "combine_datasets",
    "compare_full_clips",
    "conditioning_drift",
    "convert_captions",
    "eval_geometry",
    "eval_retrieval",
    "eval_typographic",
    "eval_zero_shot",
    "export_lora",
    "export_text_encoder",
    "export_vision_encoder",
    "fold_gmp",
    "gmp_form",
    "load_dataset",
    "load_full_clip",
    "merge_text_encoder",
    "merge_vision_encoder",
    "rank_captions",
    "save_full_clip",
    "save_huggingface",
    "split_dataset",
    "stretch_context",
    "to_gmp",
    "train",
    "transplant_tower",
    "weight_drift",
]
