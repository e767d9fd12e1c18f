"""CLIP fine-tuning without ComfyUI: open, train, fold, export, merge, blend and evaluate."""

from .clip.blend import blend
from .clip.export import export_text_encoder
from .clip.full_clip import FullCLIP, load_full_clip, save_full_clip
from .clip.gmp import fold_gmp, to_gmp
from .clip.merge import merge_text_encoder
from .clip.network import build_network
from .errors import UserError
