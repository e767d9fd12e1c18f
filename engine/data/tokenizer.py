"""Captions as the tokens of OpenAI's byte-pair encoding."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..errors import UserError
from ..openai import END, START, VOCABULARY

# Texts whose tokens are kept, so that a caption is tokenised once and not once an epoch; about 250 bytes each.
_KEPT_TEXTS = 500_000
# Of a text, what can matter: no context holds more, and one word of a million letters would take minutes.
_MOST_LETTERS = 4096


class Tokenizer:
    """Texts to int64 tokens [n, context_length]: start, the text's tokens, end, then zeros.

    A text that is too long is cut behind its last whole word that fits, with the end token kept last. Raises
    `UserError` for a model with another vocabulary than OpenAI's.
    """

    def __init__(self, context_length: int, vocab_size: int = VOCABULARY):
        if vocab_size != VOCABULARY:
            raise UserError(
                f"This model has a vocabulary of {vocab_size} tokens; only OpenAI's, of {VOCABULARY}, can be used."
            )
        self.context_length = context_length

    def __call__(self, texts: Iterable[str]) -> Tensor:
        rows = [self._cut(_codes(text)) for text in texts]
        tokens = numpy.zeros((len(rows), self.context_length), dtype=numpy.int64)
        for row, codes in zip(tokens, rows, strict=True):
            row[0], row[1 : len(codes) + 1], row[len(codes) + 1] = START, codes, END
        return torch.from_numpy(tokens)

    def truncated(self, text: str) -> bool:
        """True if the text's end does not fit in the context."""
        return len(_codes(text)) > self.context_length - 2

    def key(self, text: str) -> bytes:
        """Equal for texts of equal tokens, such as Dog and dog."""
        return self._cut(_codes(text)).tobytes()

    def _cut(self, codes: numpy.ndarray) -> numpy.ndarray:
        room = self.context_length - 2
        if len(codes) <= room:
            return codes
        ends = _word_ends()
        whole = next((count for count in range(room, 0, -1) if codes[count - 1] in ends), room)
        return codes[:whole]


def cut_to_longest(tokens: Tensor, multiple: int = 1) -> Tensor:
    """Without the zeros that stand behind every text, but for what makes t such a multiple, or the whole context:
    int64 [n, t], on the CPU. A text's features are the same."""
    longest = int(tokens.argmax(dim=1).max()) + 1
    return tokens[:, : -(-longest // multiple) * multiple]


def encode(text: str) -> list[int]:
    """The tokens of a text, or of the beginning of a very long one, without start and end."""
    return _codes(text).tolist()


def _codes(text: str) -> numpy.ndarray:
    """The same, uint16 [n]."""
    return numpy.frombuffer(_encoded(text[:_MOST_LETTERS]), dtype=numpy.uint16)


@functools.lru_cache(maxsize=_KEPT_TEXTS)
def _encoded(text: str) -> bytes:
    return numpy.array(_bpe().encode(text), dtype=numpy.uint16).tobytes()


@functools.cache
def _bpe():
    """open_clip's tokenizer, from its file alone: the package imports all of torchvision's models, which takes seconds
    where the first batch is waited for."""
    package = importlib.util.find_spec("open_clip")
    if "open_clip" in sys.modules or package is None or not package.origin:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer()
    spec = importlib.util.spec_from_file_location(f"{__name__}_bpe", Path(package.origin).with_name("tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "_tokenizer", None) or module.SimpleTokenizer()  # it makes one of its own, which takes time


@functools.cache
def _word_ends() -> frozenset[int]:
    """The tokens that end a word."""
    return frozenset(number for token, number in _bpe().encoder.items() if token.endswith("</w>"))
