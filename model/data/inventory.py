"""The inventory of a data set: how each file is interpreted, and why files are left out."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

_MAX_NAMES: Final = 3
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
class SkippedFiles:
    """Files that are left out for the same reason."""

    kind: str
    """Common property of the files: `*.heic`, or a folder."""
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        files = format_count(len(self.names), "file")
        return f"left out {files} {self.kind}: {self.reason} ({join_names(self.names)})"


@dataclass(frozen=True)
class Inventory:
    """The interpretation of a data set's files."""

    file_count: int = 0
    """Number of files: the images and the files in `skipped_files`."""
    parts: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)
    """Folders or column values that named each part; empty if the source names no parts."""
    label_origin: str = "the folders' names"
    """Origin of the labels."""
    skipped_files: tuple[SkippedFiles, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences on decisions that may surprise."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        return {
            "found": self.file_count,
            "parts": {part.value: list(names) for part, names in self.parts.items()},
            "labels": self.label_origin,
            "left_out": [[group.kind, group.reason, list(group.names)] for group in self.skipped_files],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inventory:
        """Build the inventory from the output of `to_dict`."""
        return cls(
            int(values["found"]),
            {Part(part): tuple(names) for part, names in values["parts"].items()},
            str(values["labels"]),
            tuple(SkippedFiles(kind, reason, tuple(names)) for kind, reason, names in values["left_out"]),
            tuple(values["notes"]),
        )

    @property
    def skipped_count(self) -> int:
        """Number of files that are left out."""
        return sum(len(group.names) for group in self.skipped_files)

    def list_skipped_files(self) -> list[str]:
        """Return a line for each file that is left out."""
        return [f"{name}: {group.reason}" for group in self.skipped_files for name in group.names]

    def summarize(self) -> dict[str, Any]:
        """Return counts for a run's JSON, without the names of single files."""
        groups = [
            {"kind": group.kind, "reason": group.reason, "files": len(group.names)}
            for group in self.skipped_files
        ]
        return {**self.to_dict(), "left_out": groups}


def group_skipped_files(reasons: Mapping[str, tuple[str, str]]) -> tuple[SkippedFiles, ...]:
    """Group files by (kind, reason), the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(reasons):
        groups.setdefault(reasons[name], []).append(to_printable(name))
    sorted_groups = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(
        SkippedFiles(to_printable(kind), reason, tuple(names)) for (kind, reason), names in sorted_groups
    )


def describe_kind(name: str) -> str:
    """Return the kind of a file by its suffix, such as `*.heic`."""
    suffix = posixpath.splitext(name)[1].lower()
    return f"*{suffix}" if suffix else "without a suffix"


def to_printable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode with question marks.

    Such characters cannot be written to a file or a terminal.
    """
    return text.encode(errors="replace").decode()


def join_names(names: Iterable[str], max_names: int = _MAX_NAMES) -> str:
    """Join the first few names."""
    names = list(names)
    return ", ".join(map(to_printable, names[:max_names])) + (", …" if len(names) > max_names else "")


def format_count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_frequencies(names: Iterable[str]) -> str:
    """Format how often each name occurs, the most frequent first."""
    counts = Counter(names).most_common()
    text = ", ".join(f"{to_printable(name)} {number}" for name, number in counts[:_MAX_NAMES])
    return text + (", …" if len(counts) > _MAX_NAMES else "")
