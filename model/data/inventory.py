"""The inventory of a data set: how each file is interpreted, and why files are left out."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

_SHOWN: Final = 3
"""Maximum number of names in one sentence."""


class Part(StrEnum):
    """A part of a data set: training, validation or test."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"

    @property
    def purpose(self) -> str:
        """Description of the part's purpose."""
        return {"train": "to train on", "validation": "held out", "test": "to test"}[self.value]


@dataclass(frozen=True)
class File:
    """One image of a data set."""

    name: str
    """Path inside the source, with `/`."""
    labels: tuple[str, ...]
    part: Part = Part.TRAIN


@dataclass(frozen=True)
class LeftOut:
    """Files that are left out for the same reason."""

    kind: str
    """Common property of the files: `*.heic`, or a folder."""
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"left out {count(len(self.names), 'file')} {self.kind}: {self.reason} ({some(self.names)})"


@dataclass(frozen=True)
class Inventory:
    """The interpretation of a data set's files; `found` counts the images and the files in `left_out`."""

    found: int = 0
    parts: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)
    """Folders or column values that named each part; empty if the source names no parts."""
    labels: str = "the folders' names"
    """Origin of the labels."""
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences on decisions that may surprise."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        return {
            "found": self.found,
            "parts": {part.value: list(names) for part, names in self.parts.items()},
            "labels": self.labels,
            "left_out": [[group.kind, group.reason, list(group.names)] for group in self.left_out],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inventory:
        """Build the inventory from the output of `to_dict`."""
        return cls(
            int(values["found"]),
            {Part(part): tuple(names) for part, names in values["parts"].items()},
            str(values["labels"]),
            tuple(LeftOut(kind, reason, tuple(names)) for kind, reason, names in values["left_out"]),
            tuple(values["notes"]),
        )

    @property
    def left_out_count(self) -> int:
        """Number of files that are left out."""
        return sum(len(group.names) for group in self.left_out)

    def lines(self) -> list[str]:
        """Return a line for each file that is left out."""
        return [f"{name}: {group.reason}" for group in self.left_out for name in group.names]

    def summary(self) -> dict[str, Any]:
        """Return counts for a run's JSON, without the names of single files."""
        groups = [
            {"kind": group.kind, "reason": group.reason, "files": len(group.names)} for group in self.left_out
        ]
        return {**self.to_dict(), "left_out": groups}


def group_left_out(reasons: Mapping[str, tuple[str, str]]) -> tuple[LeftOut, ...]:
    """Group files by (kind, reason), the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(reasons):
        groups.setdefault(reasons[name], []).append(printable(name))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(LeftOut(printable(kind), reason, tuple(names)) for (kind, reason), names in ordered)


def kind_of(name: str) -> str:
    """Return the kind of a file by its suffix, such as `*.heic`."""
    suffix = posixpath.splitext(name)[1].lower()
    return f"*{suffix}" if suffix else "without a suffix"


def printable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode with question marks.

    Such characters cannot be written to a file or a terminal.
    """
    return text.encode(errors="replace").decode()


def some(names: Iterable[str], most: int = _SHOWN) -> str:
    """Join the first few names."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tally(names: Iterable[str]) -> str:
    """Format how often each name occurs, the most frequent first."""
    counts = Counter(names).most_common()
    shown = ", ".join(f"{printable(name)} {number}" for name, number in counts[:_SHOWN])
    return shown + (", …" if len(counts) > _SHOWN else "")
