"""The inventory of a data set: what its files were taken for, which were left out, and why."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

_SHOWN: Final = 3
"""Names in one sentence."""


class Part(StrEnum):
    """A part of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"

    @property
    def purpose(self) -> str:
        """Say in words what the part is for."""
        return {"train": "to train on", "validation": "held out", "test": "to test"}[self.value]


@dataclass(frozen=True)
class File:
    """One image of a data set."""

    name: str
    """The path inside the source, with `/`."""
    labels: tuple[str, ...]
    part: Part = Part.TRAIN


@dataclass(frozen=True)
class LeftOut:
    """Files that are not used, for one reason."""

    kind: str
    """What the files have in common: `*.heic`, or a folder."""
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"left out {count(len(self.names), 'file')} {self.kind}: {self.reason} ({some(self.names)})"


@dataclass(frozen=True)
class Inventory:
    """What the files of a data set were taken for. `found` is the sum of the images and of `left_out`."""

    found: int = 0
    parts: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)
    """By what each part was known: folders, or values of a column. Empty where the source names no parts."""
    labels: str = "the folders' names"
    """Where the labels were read."""
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences on decisions that may surprise."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to what JSON gives back of them."""
        return {
            "found": self.found,
            "parts": {part.value: list(names) for part, names in self.parts.items()},
            "labels": self.labels,
            "left_out": [[group.kind, group.reason, list(group.names)] for group in self.left_out],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inventory:
        """Read what `to_dict` wrote."""
        return cls(
            int(values["found"]),
            {Part(part): tuple(names) for part, names in values["parts"].items()},
            str(values["labels"]),
            tuple(LeftOut(kind, reason, tuple(names)) for kind, reason, names in values["left_out"]),
            tuple(values["notes"]),
        )

    @property
    def left_out_count(self) -> int:
        """The number of files that are left out."""
        return sum(len(group.names) for group in self.left_out)

    def lines(self) -> list[str]:
        """Return a line for each file that is left out."""
        return [f"{name}: {group.reason}" for group in self.left_out for name in group.names]

    def summary(self) -> dict[str, Any]:
        """Counts for a run's JSON, without the names of single files."""
        groups = [
            {"kind": group.kind, "reason": group.reason, "files": len(group.names)} for group in self.left_out
        ]
        return {**self.to_dict(), "left_out": groups}


def group_left_out(reasons: Mapping[str, tuple[str, str]]) -> tuple[LeftOut, ...]:
    """Group files, each with its (kind, reason), the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(reasons):
        groups.setdefault(reasons[name], []).append(printable(name))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(LeftOut(printable(kind), reason, tuple(names)) for (kind, reason), names in ordered)


def kind_of(name: str) -> str:
    """Name the kind of a file by its suffix, such as `*.heic`."""
    suffix = posixpath.splitext(name)[1].lower()
    return f"*{suffix}" if suffix else "without a suffix"


def printable(text: str) -> str:
    """Replace what is not UTF-8 by question marks: such text cannot be written to a file or a terminal."""
    return text.encode(errors="replace").decode()


def some(names: Iterable[str], most: int = _SHOWN) -> str:
    """Join the first few names."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


def count(number: int, noun: str) -> str:
    """Write a number with its noun: `1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tally(names: Iterable[str]) -> str:
    """Write how often each of the names occurs, the most frequent first."""
    counts = Counter(names).most_common()
    shown = ", ".join(f"{printable(name)} {number}" for name, number in counts[:_SHOWN])
    return shown + (", …" if len(counts) > _SHOWN else "")
