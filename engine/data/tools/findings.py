"""What `inspect_dataset` found in plain English, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from .inspect import Inspection

_SHOWN = 8  # names of a list
_SMALL = 224  # pixels; what most CLIPs see
_UNEVEN = 10  # times as many pictures in the largest class as in the smallest


def report_text(found: Inspection) -> str:
    """What the data set is, then a paragraph for each thing to mend with the first few names; then notes."""
    findings = advice(found) or ["Nothing needs mending."]
    return "\n\n".join(["\n".join(_facts(found)), *findings, *found.notes])


def advice(found: Inspection) -> list[str]:
    """A paragraph for each finding: what it is, what to do, and examples, a line each."""
    checks = (
        _broken,
        _missing,
        _without_captions,
        _unnamed,
        _cut,
        _exact,
        _near,
        _repeated,
        _small,
        _uneven,
    )
    return [words for check in checks if (words := check(found))]


# ---- facts -----------------------------------------------------------------------------------------------------------


def _facts(found: Inspection) -> list[str]:
    lines = [f"{found.name}: {_count(found.images, 'picture')} ({found.reason})."]
    if found.originals < found.images:
        lines.append(f"They were made from {_count(found.originals, 'original')}.")
    if len(found.sizes):
        widths, heights = found.sizes.T.tolist()
        low, high = min(zip(widths, heights, strict=True), key=min), max(zip(widths, heights, strict=True), key=min)
        ratios = found.sizes[:, 0] / found.sizes[:, 1]
        lines.append(
            f"Sizes: from {low[0]} × {low[1]} to {high[0]} × {high[1]} pixels; width by height from "
            f"{ratios.min():.2f} to {ratios.max():.2f}, in the middle {numpy.median(ratios):.2f}."
        )
    if found.captions:
        short, middle, long = caption_lengths(found)
        lines.append(f"Captions: {found.captions}, of {short} to {long} tokens, in the middle {middle}.")
    if found.classes:
        counts = found.classes.values()
        lines.append(f"Classes: {len(counts)}, with {min(counts)} to {max(counts)} pictures each.")
    return lines


def caption_lengths(found: Inspection) -> tuple[int, int, int]:
    """(shortest, median, longest) caption in tokens; zeros where there is none."""
    if not found.token_counts:
        return 0, 0, 0
    lengths, counts = zip(*sorted(found.token_counts.items()), strict=True)
    half = numpy.searchsorted(numpy.cumsum(counts), sum(counts) / 2)
    return lengths[0], lengths[int(half)], lengths[-1]


# ---- findings --------------------------------------------------------------------------------------------------------


def _broken(found: Inspection) -> str:
    gone = set(found.missing)
    broken = [f"{item.file}: {item.reason}" for item in found.broken if item.file not in gone]
    return _finding(
        broken,
        "is broken and left out of training",
        "are broken and left out of training",
        "Get them again, or remove them:",
    )


def _missing(found: Inspection) -> str:
    return _finding(
        found.missing,
        "has a caption but is not there",
        "have a caption but are not there",
        "Put the files where the captions say, or take them out of the caption file:",
    )


def _without_captions(found: Inspection) -> str:
    return _finding(
        found.without_captions,
        "has neither caption nor class",
        "have neither caption nor class",
        "Nothing can be learnt from them; write captions, or remove them:",
    )


def _unnamed(found: Inspection) -> str:
    return _finding(
        found.unnamed,
        "in the folder is not in this data set",
        "in the folder are not in this data set",
        "They have no caption; write some if they are to be learnt:",
    )


def _cut(found: Inspection) -> str:
    if not found.truncated_captions:
        return ""
    return (
        f"{_count(found.truncated_captions, 'caption')} of {found.captions} "
        f"{'is' if found.truncated_captions == 1 else 'are'} longer than the {found.context_length} tokens that CLIP "
        f"reads, and the end is cut off (the longest is of {found.longest_caption}). Put what matters first, shorten "
        "them, or train a model with context_length 248."
    )


def _exact(found: Inspection) -> str:
    if not found.exact_duplicates:
        return ""
    more = sum(len(group) - 1 for group in found.exact_duplicates)
    words = (
        f"{_count(more, 'picture')} too many: the same file is there under several names. Keep one of each and give it "
        "all the captions; else the training takes equal pictures for different ones:"
    )
    return "\n".join([words, *_listed([" = ".join(_cut_names(group)) for group in found.exact_duplicates])])


def _near(found: Inspection) -> str:
    if not found.near_duplicates:
        return ""
    words = (
        f"{_count(len(found.near_duplicates), 'group')} of pictures that look alike (resized, saved again, or shot in "
        "a row). Look at them; if they are one picture, keep the best, so that no copy of a training picture is among "
        "those for validation:"
    )
    return "\n".join([words, *_listed([" ~ ".join(_cut_names(group)) for group in found.near_duplicates])])


def _repeated(found: Inspection) -> str:
    if not found.repeated:
        return ""
    words = (
        f"{_count(found.repeated, 'caption')} {'is' if found.repeated == 1 else 'are'} that of several pictures. The "
        "training counts them all as right, but a caption that fits many pictures teaches little about each; write "
        "what sets them apart:"
    )
    examples = [f"{count} pictures: {_short(text)}" for text, count in found.repeated_captions.items()]
    return "\n".join([words, *_listed(examples, found.repeated)])


def _small(found: Inspection) -> str:
    small = int((found.sizes.min(1) < _SMALL).sum()) if len(found.sizes) else 0
    if not small:
        return ""
    return (
        f"{_count(small, 'picture')} {'has' if small == 1 else 'have'} a side below {_SMALL} pixels and will be "
        "enlarged for most CLIPs. That does no harm for drawings and icons; replace photographs by larger ones where "
        "you can."
    )


def _uneven(found: Inspection) -> str:
    if len(found.classes) < 2 or max(found.classes.values()) < _UNEVEN * max(min(found.classes.values()), 1):
        return ""
    most, fewest = (choose(found.classes, key=found.classes.get) for choose in (max, min))
    return (
        f"The classes are uneven: {most} has {_count(found.classes[most], 'picture')}, {fewest} "
        f"{found.classes[fewest]}. The training sees the large ones more often; add pictures to the small ones, or "
        "take some out of the large ones."
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _finding(items: Sequence[str], one: str, several: str, what_to_do: str) -> str:
    if not items:
        return ""
    return "\n".join(
        [f"{_count(len(items), 'picture')} {one if len(items) == 1 else several}. {what_to_do}", *_listed(items)]
    )


def _listed(items: Sequence[str], total: int | None = None) -> list[str]:
    more = (total or len(items)) - min(len(items), _SHOWN)
    return [f"  {item}" for item in items[:_SHOWN]] + ([f"  … and {more} more"] if more else [])


def _cut_names(group: Sequence[str]) -> list[str]:
    return [*group[:4], f"… and {len(group) - 4} more"] if len(group) > 5 else list(group)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
