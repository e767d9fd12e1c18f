"""What `inspect_dataset` found, in plain English, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy

from .inspect import Inspection

_SHOWN = 8  # examples per finding
_SMALL = 224  # pixels; the image size of most CLIPs
_UNEVEN = 10  # ratio of the largest class to the smallest
_BE, _HAVE = ("is", "are"), ("has", "have")


def report_text(inspection: Inspection) -> str:
    """Return what the dataset is, a paragraph for each finding, and the dataset's notes."""
    findings = advice(inspection) or ["Nothing needs fixing."]
    return "\n\n".join(["\n".join(_facts(inspection)), *findings, *inspection.notes])


def advice(inspection: Inspection) -> list[str]:
    """Return a paragraph for each finding: what it is, what to do, and examples, one a line."""
    checks = (
        _unusable_images,
        _truncated,
        _exact_duplicates,
        _near_duplicates,
        _repeated_captions,
        _small,
        _uneven,
    )
    return [finding for check in checks for finding in check(inspection) if finding]


# ---- facts -----------------------------------------------------------------------------------------------------------


def _facts(inspection: Inspection) -> list[str]:
    lines = [f"{inspection.name}: {_count(inspection.images, 'image')} ({inspection.reason})."]
    if inspection.originals < inspection.images:
        lines.append(f"They were made from {_count(inspection.originals, 'original')}.")
    if len(inspection.sizes):
        sizes = inspection.sizes.tolist()
        smallest, largest = min(sizes, key=min), max(sizes, key=min)
        ratios = inspection.sizes[:, 0] / inspection.sizes[:, 1]
        lines.append(
            f"Sizes: from {smallest[0]} × {smallest[1]} to {largest[0]} × {largest[1]} pixels; width divided by height "
            f"from {ratios.min():.2f} to {ratios.max():.2f}, median {numpy.median(ratios):.2f}."
        )
    if inspection.captions:
        shortest, median, longest = caption_lengths(inspection)
        lines.append(f"Captions: {inspection.captions}, of {shortest} to {longest} tokens, median {median}.")
    if inspection.classes:
        counts = inspection.classes.values()
        lines.append(f"Classes: {len(counts)}, with {min(counts)} to {max(counts)} images each.")
    return lines


def caption_lengths(inspection: Inspection) -> tuple[int, int, int]:
    """Return the (shortest, median, longest) caption in tokens; zeros if there is none."""
    if not inspection.token_counts:
        return 0, 0, 0
    lengths, counts = zip(*sorted(inspection.token_counts.items()), strict=True)
    half = numpy.searchsorted(numpy.cumsum(counts), sum(counts) / 2)
    return lengths[0], lengths[int(half)], lengths[-1]


# ---- findings --------------------------------------------------------------------------------------------------------


def _unusable_images(inspection: Inspection) -> Iterator[str]:
    missing = set(inspection.missing)
    broken = [f"{item.file}: {item.reason}" for item in inspection.broken if item.file not in missing]
    yield _about_images(broken, _BE, "broken and left out of training", "Get them again, or remove them:")
    what_to_do = "Put the files where the captions say, or remove them from the caption file:"
    yield _about_images(inspection.missing, _HAVE, "a caption but no file", what_to_do)
    what_to_do = "Nothing can be learned from them; write captions, or remove them:"
    yield _about_images(inspection.without_captions, _HAVE, "neither caption nor class", what_to_do)
    what_to_do = "They have no caption; write some to train on them:"
    yield _about_images(inspection.unnamed, _BE, "in the folder but not in this dataset", what_to_do)


def _truncated(inspection: Inspection) -> Iterator[str]:
    count = inspection.truncated_captions
    if not count:
        return
    yield (
        f"{_count(count, 'caption')} of {inspection.captions} {_verb(count, _BE)} longer than the "
        f"{inspection.context_length} tokens that CLIP reads, and the end is cut off (the longest is that of "
        f"{inspection.longest_caption}). Put what matters first, shorten them, or train a model with "
        "context_length 248."
    )


def _exact_duplicates(inspection: Inspection) -> Iterator[str]:
    if not inspection.exact_duplicates:
        return
    extra = sum(len(group) - 1 for group in inspection.exact_duplicates)
    text = (
        f"{_count(extra, 'image')} too many: the same file is there under several names. Keep one of each and give it "
        "all the captions; otherwise the training treats equal images as different ones:"
    )
    yield _with_examples(text, (" = ".join(_shortened(group)) for group in inspection.exact_duplicates))


def _near_duplicates(inspection: Inspection) -> Iterator[str]:
    if not inspection.near_duplicates:
        return
    text = (
        f"{_count(len(inspection.near_duplicates), 'group')} of images that look alike (resized, saved again, or shot "
        "in a row). Look at them. If they are one image, keep the best, so that no copy of a training image is used "
        "for validation:"
    )
    yield _with_examples(text, (" ~ ".join(_shortened(group)) for group in inspection.near_duplicates))


def _repeated_captions(inspection: Inspection) -> Iterator[str]:
    count = inspection.repeated
    if not count:
        return
    text = (
        f"{_count(count, 'caption')} {_verb(count, _BE)} shared by several images. The training counts all of those "
        "images as correct, but a caption that fits many images teaches little about each. Write what sets them apart:"
    )
    examples = (f"{images} images: {_cut(caption)}" for caption, images in inspection.repeated_captions.items())
    yield _with_examples(text, examples, count)


def _small(inspection: Inspection) -> Iterator[str]:
    count = int((inspection.sizes.min(1) < _SMALL).sum()) if len(inspection.sizes) else 0
    if not count:
        return
    yield (
        f"{_count(count, 'image')} {_verb(count, _HAVE)} a side below {_SMALL} pixels and will be enlarged "
        "for most CLIPs. This does no harm for drawings and icons; replace photographs by larger ones where you can."
    )


def _uneven(inspection: Inspection) -> Iterator[str]:
    classes = inspection.classes
    if len(classes) < 2 or max(classes.values()) < _UNEVEN * max(min(classes.values()), 1):
        return
    most, fewest = (choose(classes, key=lambda name: classes[name]) for choose in (max, min))
    yield (
        f"The classes are uneven: {most} has {_count(classes[most], 'image')}, {fewest} {classes[fewest]}. The "
        "training sees the large ones more often. Add images to the small ones, or remove some from the large ones."
    )


# ---- text ------------------------------------------------------------------------------------------------------------


def _about_images(items: Sequence[str], verb: tuple[str, str], what: str, what_to_do: str) -> str:
    if not items:
        return ""
    return _with_examples(f"{_count(len(items), 'image')} {_verb(len(items), verb)} {what}. {what_to_do}", items)


def _with_examples(text: str, examples: Iterable[str], total: int | None = None) -> str:
    """Return the text with the first examples; `total` is the number of all, if there are more than those given."""
    items = list(examples)
    hidden = (total or len(items)) - min(len(items), _SHOWN)
    lines = [text, *(f"  {item}" for item in items[:_SHOWN])]
    return "\n".join(lines + ([f"  … and {hidden} more"] if hidden else []))


def _shortened(group: Sequence[str]) -> list[str]:
    return [*group[:4], f"… and {len(group) - 4} more"] if len(group) > 5 else list(group)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _verb(number: int, forms: tuple[str, str]) -> str:
    return forms[number != 1]
