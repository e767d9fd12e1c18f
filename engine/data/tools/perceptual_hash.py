"""Which pictures look alike: a hash of what each one shows, and the groups whose hashes differ in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

# Of 128 bits. On photographs (Flickr8k) different pictures differ in 23 bits at least, smaller or recompressed ones in
# 14 at most, and colour-jittered ones (torchvision's 0.5, 0.5, 0.5, 0.1) in up to 15 for 97 of 100.
NEAR = 15
_BANDS, _BAND_BITS = 8, 16
_MOST_COMPARED = 256  # pictures of one band's value that one picture is compared with
_PAIRS_AT_ONCE = 2**21
_LONGEST_CHAIN = 20_000
_HUE_APART = 50.0  # degrees; a jitter of 0.1 turns hues by 36
_COLOURLESS = 6.0  # of 255: a mean colour this close to grey has no hue
_PLAIN = 2.0  # of 255: with less contrast than this a picture shows nothing to compare


class Look(NamedTuple):
    """`words`: the hash, twice 64 bits. `colour`: mean red, green and blue, 0 to 255. `plain`: a picture with nothing
    on it, whose hash says nothing."""

    words: tuple[int, int]
    colour: tuple[int, int, int]
    plain: bool


def look(picture) -> Look:
    """What a picture (PIL, RGB) looks like.

    The hash is the difference hash of N. Krawetz ("Kind of Like That", 2013), taken in both directions: whether each
    of 8 × 8 places is darker than the one right of it, and than the one below.
    """
    from PIL import Image

    small = picture.resize((32, 32), Image.Resampling.BOX)
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
    """Groups of two and more rows, in order, all of which are like the first: hashes at most `NEAR` bits apart and like
    hues. A row is in one group at most.

    `hashes` uint64 [n, 2], `colours` uint8 [n, 3]. Every such pair is found: of 8 bands of 16 bits at least one differs
    in a bit or none, so that only pictures are compared that agree so far in some band. Only where more than 256
    pictures agree in a band is each compared with some of them; chains of the others still connect them.
    """
    return [
        group
        for chain in _chains(hashes, colours, check_cancelled)
        for group in _around_the_first(hashes, colours, chain, check_cancelled)
    ]


def _around_the_first(
    hashes: numpy.ndarray, colours: numpy.ndarray, chain: numpy.ndarray, check_cancelled: Callable[[], None]
) -> Iterator[list[int]]:
    """A chain, whose ends may be unlike, as groups; one so long that it is no accident stays whole."""
    if len(chain) > _LONGEST_CHAIN:
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
    """Rows that are connected by pairs of like ones, in order."""
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
    return [found for found in numpy.split(order, edges) if len(found) > 1]


def _candidates(
    hashes: numpy.ndarray, check_cancelled: Callable[[], None]
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Pairs of rows (left, right) that agree in a band but for one bit at most."""
    for band in range(_BANDS):
        values = _band(hashes, band)
        order = numpy.argsort(values, kind="stable")
        values = values[order]
        starts = numpy.searchsorted(values, numpy.arange(2**_BAND_BITS + 1))
        everyone = numpy.arange(len(order))
        joins = [(everyone, everyone + 1, starts[values + 1])]
        for place in range(_BAND_BITS):
            without = numpy.flatnonzero(values >> place & 1 == 0)
            flipped = values[without] | 1 << place
            joins.append((without, starts[flipped], starts[flipped + 1]))
        for places, first, last in joins:
            for left, right in _products(places, first, last):
                check_cancelled()
                yield order[left], order[right]


def _band(hashes: numpy.ndarray, band: int) -> numpy.ndarray:
    """Every eighth bit, as numbers below 2^16; bits that lie together are too alike to tell pictures apart."""
    values = numpy.zeros(len(hashes), dtype=numpy.int64)
    for place in range(_BAND_BITS):
        word, shift = divmod(band + _BANDS * place, 64)
        bit = hashes[:, word] >> numpy.uint64(shift) & numpy.uint64(1)
        values |= bit.astype(numpy.int64) << place
    return values


def _products(
    places: numpy.ndarray, first: numpy.ndarray, last: numpy.ndarray
) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Each of `places` with each of first … last - 1 (but for `_MOST_COMPARED`), some millions at a time."""
    counts = numpy.clip(last - first, 0, _MOST_COMPARED)
    some = counts > 0
    places, first, counts = places[some], first[some], counts[some]
    ends = numpy.cumsum(counts)
    start = 0
    while start < len(places):
        done = ends[start] - counts[start]
        stop = int(numpy.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right"))
        stop = max(stop, start + 1)
        times = counts[start:stop]
        before = numpy.repeat(ends[start:stop] - times, times)
        within = numpy.arange(done, ends[stop - 1]) - before
        yield numpy.repeat(places[start:stop], times), numpy.repeat(first[start:stop], times) + within
        start = stop


def _bits_apart(one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """Differing bits of uint64 [n, 2]; the sums of H. S. Warren, Hacker's Delight, 5-1 (numpy 1 has no bit count)."""
    x = one ^ other
    x = x - (x >> numpy.uint64(1) & numpy.uint64(0x5555555555555555))
    x = (x & numpy.uint64(0x3333333333333333)) + (x >> numpy.uint64(2) & numpy.uint64(0x3333333333333333))
    x = x + (x >> numpy.uint64(4)) & numpy.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * numpy.uint64(0x0101010101010101) >> numpy.uint64(56)).sum(1)


def _like_hues(one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """Whether mean colours, uint8 [n, 3], have hues at most `_HUE_APART` degrees apart, or one of them none."""
    a, b = _chroma(one), _chroma(other)
    lengths = numpy.hypot(*a.T), numpy.hypot(*b.T)
    cosine = (a * b).sum(1) / numpy.maximum(lengths[0] * lengths[1], 1e-9)
    return (numpy.minimum(*lengths) < _COLOURLESS) | (cosine >= numpy.cos(numpy.radians(_HUE_APART)))


def _chroma(colours: numpy.ndarray) -> numpy.ndarray:
    """Blue and red less the luma of ITU-R BT.601, [n, 2]."""
    rgb = colours.astype(numpy.float32)
    luma = rgb @ numpy.array([0.299, 0.587, 0.114], dtype=numpy.float32)
    return numpy.stack([rgb[:, 2] - luma, rgb[:, 0] - luma], axis=1)


def _connect(group: numpy.ndarray, left: numpy.ndarray, right: numpy.ndarray) -> None:
    """Give each pair the same group: `group`, the lowest row that a row is connected with, changes in place."""
    while True:
        a, b = group[left], group[right]
        apart = a != b
        if not apart.any():
            return
        numpy.minimum.at(group, numpy.maximum(a, b)[apart], numpy.minimum(a, b)[apart])
        while not numpy.array_equal(further := group[group], group):
            group[:] = further
