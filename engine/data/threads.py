"""Run a function over many items in background threads, keeping the order of the items."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Threads are enough, inside ComfyUI too: image decoding, resizing and copying release Python's global lock.
THREADS = min(16, os.cpu_count() or 1)


def in_threads(function: Callable[[T], R], items: Iterable[T], ahead: int = 64) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from ordered(pool, function, items, ahead)


def ordered(
    pool: ThreadPoolExecutor,
    function: Callable[[T], R],
    items: Iterable[T],
    ahead: int,
    shortcut: Callable[[T], R | None] = lambda item: None,
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order, computed by the pool up to `ahead` items in advance.

    `shortcut` runs in this thread first; what it returns, unless None, is used instead. It is for results that are
    cheaper to look up than to hand to a thread.
    """
    waiting: collections.deque[Future[R] | R] = collections.deque()

    def first() -> R:
        entry = waiting.popleft()
        return entry.result() if isinstance(entry, Future) else entry

    try:
        for item in items:
            result = shortcut(item)
            waiting.append(pool.submit(function, item) if result is None else result)
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        for entry in waiting:
            if isinstance(entry, Future):
                entry.cancel()
