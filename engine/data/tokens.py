"""Captions as the tokens of OpenAI's byte-pair encoding."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import UserError
from ..openai import END, START, VOCABULARY


class Tokenizer:
    """Texts to int64 tokens [n, context_length]: start, the text's tokens, end, then zeros.

    A text that is too long is cut, with the end token kept last. Raises `UserError` for a model with another
    vocabulary than OpenAI's.
    """

    def __init__(self, context_length: int, vocab_size: int = VOCABULARY):
        if vocab_size != VOCABULARY:
            raise UserError(
                f"This model has a vocabulary of {vocab_size} tokens; only OpenAI's, of {VOCABULARY}, can be used."
            )
        self.context_length = context_length

    def __call__(self, texts: Iterable[str]) -> Tensor:
        rows = [encode(text) for text in texts]
        tokens = torch.zeros(len(rows), self.context_length, dtype=torch.int64)
        for row, codes in zip(tokens, rows, strict=True):
            kept = [START, *codes[: self.context_length - 2], END]
            row[: len(kept)] = torch.tensor(kept)
        return tokens

    def truncated(self, text: str) -> bool:
        """True if the text's end does not fit in the context."""
        return len(encode(text)) > self.context_length - 2


@functools.lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    """The text's own tokens, without start and end."""
    return tuple(_bpe().encode(text))


@functools.cache
def _bpe():
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()
