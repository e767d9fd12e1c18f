"""What every reader of captions gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader found, a row a picture: its name as written, its captions (a line for each, or none), its class (""
    for none), the folder that its name starts from, and how often it comes in an epoch.

    `reason` tells in a few words why this reader was chosen; `notes` are sentences for the user; `originals` are the
    paths of the pictures that copies were made from, by those of the copies, all absolute.
    """

    format: str
    reason: str
    names: list[str]
    captions: list[str]
    origins: list[str]
    classes: list[str] | None = None
    repeats: list[int] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    originals: Mapping[str, str] = dataclasses.field(default_factory=dict)
