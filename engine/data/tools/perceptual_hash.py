"""Near-duplicates: a perceptual hash of each image, and groups of images whose hashes differ in few bits.

Home-made because the library ImageHash takes four times as long per image, brings SciPy and PyWavelets along and does
not search among many hashes (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from PIL import Image

# Of 128 bits. On photographs (Flickr8k) different images differ in at least 23 bits, smaller or recompressed copies in
# at most 14, and 97 of 100 colour-jittered copies (torchvision's 0.5, 0.5, 0.5, 0.1) in at most 15.
NEAR = 15
_BANDS, _BAND_BITS = 8, 16
_MAX_COMPARED = 256  # hashes with the same value in a band that one hash is compared with
_PAIRS_AT_ONCE = 2**21
_MAX_CHAIN = 20_000
_MAX_HUE_DISTANCE = 50.0  # degrees; a jitter of 0.1 turns hues by 36
_COLOURLESS = 6.0  # of 255: a mean colour this close to grey has no hue
_PLAIN = 2.0  # of 255: an image with less contrast has no detail to compare


class Look(NamedTuple):
    """What an image looks like.

    `words` is the hash, twice 64 bits. `colour` is the mean red, green and blue, 0 to 255. The hash of a `plain` image,
    which has no detail, means nothing.
    """

    words: tuple[int, int]
    colour: tuple[int, int, int]
    plain: bool


def look(image: Image.Image) -> Look:
    """Return what an RGB image looks like.

    The hash is the difference hash of N. Krawetz ("Kind of Like That", 2013) in both directions: whether each cell of
    an 8 × 8 grid is darker than the cell to its right, and than the cell below it.
    """
    from PIL import Image

    small = image.resize((32, 32), Image.Resampling.BOX)
    grey = small.convert("L")
    wide, tall = (
        numpy.asarray(grey.resize(size, Image.Resampling.LANCZOS), dtype=numpy.int16) for size in ((9, 8), (8, 9))
    )
    bits = numpy.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (tall[1:] > tall[:-1]).ravel()])
    packed = numpy.packbits(bits).tobytes()
    red, green, blue = numpy.asarray(small).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return Look(
        (int.from_bytes(packed[:8], "big"), int.from_bytes(packed[8:], "big")),
        (red, green, blue),
        bool(numpy.asarray(grey).std() < _PLAIN),
    )


def near_groups(
    hashes: numpy.ndarray, colours: numpy.ndarray, *, check_cancelled: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Return groups of two or more near-duplicates, as sorted row numbers; a row is in at most one group.

    Each member of a group is near the first: its hash is at most `NEAR` bits away, and its hue is similar. `hashes` is
    uint64 [n, 2], `colours` uint8 [n, 3].

    Every near pair is found: among 8 bands of 16 bits, two hashes at most 15 bits apart have at least one band with at
    most one different bit, so only such hashes are compared. Where more than 256 hashes agree in a band, each is
    compared with some of them only, and chains through the others still connect them.
    """
    return [
        group
        for chain in _chains(hashes, colours, check_cancelled)
        for group in _around_the_first(hashes, colours, chain, check_cancelled)
    ]


def _around_the_first(
    hashes: numpy.ndarray, colours: numpy.ndarray, chain: numpy.ndarray, check_cancelled: Callable[[], None]
) -> Iterator[list[int]]:
    """Split a chain, whose ends may be unlike each other, into groups; a very long one is no accident and stays."""
    if len(chain) > _MAX_CHAIN:
        yield chain.tolist()
        return
    while len(chain) > 1:
        check_cancelled()
        like = _bits_apart(hashes[chain], hashes[chain[:1]]) <= NEAR
        like &= _like_hues(colours[chain], colours[chain[:1]])
        like[0] = True
        if like.sum() > 1:
            yield chain[like].tolist()
        chain = chain[~like]


def _chains(hashes: numpy.ndarray, colours: numpy.ndarray, check_cancelled: Callable[[], None]) -> list[numpy.ndarray]:
    """Return the sorted rows of each chain: rows that are connected by near pairs."""
    group = numpy.arange(len(hashes))
    for left, right in _candidates(hashes, check_cancelled):
        unconnected = group[left] != group[right]
        left, right = left[unconnected], right[unconnected]
        near = _bits_apart(hashes[left], hashes[right]) <= NEAR
        left, right = left[near], right[near]
        alike = _like_hues(colours[left], colours[right])
        _connect(group, left[alike], right[alike])
    order = numpy.argsort(group, kind="stable")
    edges = numpy.flatnonzero(numpy.diff(group[order])) + 1
    return [chain for chain in numpy.split(order, edges) if len(chain) > 1]


def _candidates(
    hashes: numpy.ndarray, check_cancelled: Callable[[], None]
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Yield pairs of rows (left, right) that differ in at most one bit of some band, some millions at a time."""
    for band in range(_BANDS):
        values = _band(hashes, band)
        order = numpy.argsort(values, kind="stable")
        values = values[order]
        starts = numpy.searchsorted(values, numpy.arange(2**_BAND_BITS + 1))
        # Equal values: each hash with those after it. One bit apart: each hash without the bit with those that have it.
        positions = numpy.arange(len(order))
        ranges = [(positions, positions + 1, starts[values + 1])]
        for bit in range(_BAND_BITS):
            without = numpy.flatnonzero(values >> bit & 1 == 0)
            flipped = values[without] | 1 << bit
            ranges.append((without, starts[flipped], starts[flipped + 1]))
        for positions, first, last in ranges:
            for left, right in _products(positions, first, last):
                check_cancelled()
                yield order[left], order[right]


def _band(hashes: numpy.ndarray, band: int) -> numpy.ndarray:
    """Return every eighth bit, as numbers below 2^16: neighbouring bits are too similar to tell images apart."""
    values = numpy.zeros(len(hashes), dtype=numpy.int64)
    for position in range(_BAND_BITS):
        word, shift = divmod(band + _BANDS * position, 64)
        bit = hashes[:, word] >> numpy.uint64(shift) & numpy.uint64(1)
        values |= bit.astype(numpy.int64) << position
    return values


def _products(
    positions: numpy.ndarray, first: numpy.ndarray, last: numpy.ndarray
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Yield each of `positions` paired with each of its range from `first` to `last` - 1, of which at most 256 count.

    The pairs come as (left, right), some millions at a time.
    """
    counts = numpy.clip(last - first, 0, _MAX_COMPARED)
    nonempty = counts > 0
    positions, first, counts = positions[nonempty], first[nonempty], counts[nonempty]
    ends = numpy.cumsum(counts)
    start = 0
    while start < len(positions):
        done = ends[start] - counts[start]
        stop = int(numpy.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right"))
        stop = max(stop, start + 1)
        repeats = counts[start:stop]
        before = numpy.repeat(ends[start:stop] - repeats, repeats)
        within = numpy.arange(done, ends[stop - 1]) - before  # 0, 1, 2 and so on in each range
        yield numpy.repeat(positions[start:stop], repeats), numpy.repeat(first[start:stop], repeats) + within
        start = stop


def _bits_apart(one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """Return the number of differing bits of uint64 [n, 2].

    The bits are added in pairs, then in fours, then in bytes (H. S. Warren, Hacker's Delight, 5-1): numpy 1 cannot
    count bits.
    """
    x = one ^ other
    x = x - (x >> numpy.uint64(1) & numpy.uint64(0x5555555555555555))
    x = (x & numpy.uint64(0x3333333333333333)) + (x >> numpy.uint64(2) & numpy.uint64(0x3333333333333333))
    x = x + (x >> numpy.uint64(4)) & numpy.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * numpy.uint64(0x0101010101010101) >> numpy.uint64(56)).sum(1)


def _like_hues(one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """Return whether mean colours, uint8 [n, 3], have hues at most `_MAX_HUE_DISTANCE` degrees apart, or no hue."""
    a, b = _chroma(one), _chroma(other)
    lengths = numpy.hypot(*a.T), numpy.hypot(*b.T)
    cosine = (a * b).sum(1) / numpy.maximum(lengths[0] * lengths[1], 1e-9)
    return (numpy.minimum(*lengths) < _COLOURLESS) | (cosine >= numpy.cos(numpy.radians(_MAX_HUE_DISTANCE)))


def _chroma(colours: numpy.ndarray) -> numpy.ndarray:
    """Return blue and red minus the luma of ITU-R BT.601, [n, 2]."""
    rgb = colours.astype(numpy.float32)
    luma = rgb @ numpy.array([0.299, 0.587, 0.114], dtype=numpy.float32)
    return numpy.stack([rgb[:, 2] - luma, rgb[:, 0] - luma], axis=1)


def _connect(group: numpy.ndarray, left: numpy.ndarray, right: numpy.ndarray) -> None:
    """Merge the groups of each pair in place; `group` holds, for each row, the lowest row it is connected with."""
    while True:
        a, b = group[left], group[right]
        apart = a != b
        if not apart.any():
            return
        numpy.minimum.at(group, numpy.maximum(a, b)[apart], numpy.minimum(a, b)[apart])
        while not numpy.array_equal(lowest := group[group], group):
            group[:] = lowest
