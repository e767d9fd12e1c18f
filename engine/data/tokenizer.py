"""Captions as token ids of OpenAI's byte-pair encoding."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import UserError
from ..openai import END, START, VOCABULARY

_CACHED_TEXTS = 500_000  # so that a caption is encoded once, not once an epoch; about 250 bytes each
# Only the beginning of a text is encoded: no context holds more, and one word of a million letters would take minutes.
_MOST_LETTERS = 4096


class Tokenizer:
    """Turns texts into int64 token ids [n, context_length]: start token, the text, end token, then zeros.

    A text that is too long is truncated after the last whole word that fits, and keeps its end token. Raises
    `UserError` for a model whose vocabulary is not OpenAI's.
    """

    def __init__(self, context_length: int, vocab_size: int = VOCABULARY):
        if vocab_size != VOCABULARY:
            raise UserError(
                f"This model has a vocabulary of {vocab_size} tokens; only OpenAI's vocabulary of {VOCABULARY} is "
                "supported."
            )
        self.context_length = context_length

    def __call__(self, texts: Iterable[str]) -> Tensor:
        rows = [self._fitting(_token_ids(text)) for text in texts]
        tokens = numpy.zeros((len(rows), self.context_length), dtype=numpy.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[0], row[1 : len(ids) + 1], row[len(ids) + 1] = START, ids, END
        return torch.from_numpy(tokens)

    def truncated(self, text: str) -> bool:
        """Return whether the text does not fit in the context."""
        return len(_token_ids(text)) > self.context_length - 2

    def key(self, text: str) -> bytes:
        """Return bytes that are equal for texts with equal token ids, such as Dog and dog."""
        return self._fitting(_token_ids(text)).tobytes()

    def _fitting(self, ids: numpy.ndarray) -> numpy.ndarray:
        room = self.context_length - 2
        if len(ids) <= room:
            return ids
        ends = _word_ends()
        length = next((count for count in range(room, 0, -1) if ids[count - 1] in ends), room)
        return ids[:length]


def cut_to_longest(tokens: Tensor, multiple: int = 1) -> Tensor:
    """Trim the token batch to its longest text, int64 [n, t]; text features stay the same.

    t is rounded up to a multiple of `multiple`, but never exceeds the context length.
    """
    longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the highest id
    return tokens[:, : -(-longest // multiple) * multiple]


def encode(text: str) -> list[int]:
    """Return the token ids of a text, without start and end token; of a very long text, those of its beginning."""
    return _token_ids(text).tolist()


def _token_ids(text: str) -> numpy.ndarray:
    """Return the token ids as uint16 [n]."""
    return numpy.frombuffer(_encoded(text[:_MOST_LETTERS]), dtype=numpy.uint16)


@functools.lru_cache(maxsize=_CACHED_TEXTS)
def _encoded(text: str) -> bytes:
    return numpy.array(_bpe().encode(text), dtype=numpy.uint16).tobytes()


@functools.cache
def _bpe() -> Any:
    """Return open_clip's tokenizer, loaded from its file alone.

    Importing the package also imports all of torchvision's models, which would delay the first batch by seconds.
    """
    package = importlib.util.find_spec("open_clip")
    spec = None
    if "open_clip" not in sys.modules and package is not None and package.origin:
        file = Path(package.origin).with_name("tokenizer.py")
        spec = importlib.util.spec_from_file_location(f"{__name__}_bpe", file)
    if spec is None or spec.loader is None:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer()
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "_tokenizer", None) or module.SimpleTokenizer()  # the module makes one; a second takes time


@functools.cache
def _word_ends() -> frozenset[int]:
    """Return the ids of tokens that end a word."""
    return frozenset(number for token, number in _bpe().encoder.items() if token.endswith("</w>"))
