"""Bad model files, each made from nothing or from a small whole one, for test_bad_files.py and test_fuzzed_files.py.

A `BadFile` says what may become of it. None of them is one that some program writes on purpose.
"""

from . import archives, folders, headers, metadata, no_models, other_kinds, pickles, tensors  # noqa: F401 (fill BAD_FILES)
from .corpus import BAD_FILES, HUGGING_FACE, OPENAI, RAN, REFUSED, REPORTED, entry, raw_safetensors, whole
from .pickle_parts import HEAD, in_legacy, rebuilt, tensor, word

__all__ = [
    "BAD_FILES",
    "HEAD",
    "HUGGING_FACE",
    "OPENAI",
    "RAN",
    "REFUSED",
    "REPORTED",
    "entry",
    "in_legacy",
    "raw_safetensors",
    "rebuilt",
    "tensor",
    "whole",
    "word",
]
