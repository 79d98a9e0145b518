"""The interface of a source of labelled images, and its survey: which file is an image with which label.

Folders (`model.data.disk_source`), archives (`model.data.tar_archive`, `model.data.zip_archive`) and tables
(`model.data.csv_table`) are sources. Every file is counted: it is an image with a label, or it is left out
for a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Protocol

from fovea.model.data.choices import Choices
from fovea.model.data.examples import DataError
from fovea.model.data.folders import detect_layout
from fovea.model.data.inventory import File, Inventory, Part, describe_kind, group_skipped_files, to_printable
from fovea.model.data.labels import describe_spellings
from fovea.model.data.spelling import clean_label
from fovea.service.errors import BadImage

MAX_BYTES: Final = 512 << 20
"""Maximum size of an encoded image, in bytes.

No camera writes larger files, and a file is read into memory completely.
"""

HIDDEN_REASON: Final = "a hidden file or a system file"
"""Reason for leaving out hidden files and operating system files."""

EncodedImage = Path | bytes | BadImage
"""Encoded image, its path, or the reason why it cannot be read."""


@dataclass(frozen=True)
class Survey:
    """The labelled images of a source, sorted by name, and the inventory of all files."""

    files: tuple[File, ...]
    inventory: Inventory


class Source(Protocol):
    """The interface of a source of labelled images in files."""

    @property
    def name(self) -> str:
        """Name for people."""

    @property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """

    def fingerprint(self) -> str:
        """Return a digest of sizes and times that changes when an image or a label changes."""

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index in `names` and the image, or its path, in the fastest order."""

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image as an open file at its beginning; the file is valid until the next image."""


@dataclass
class Listing:
    """The files of a source."""

    names: list[str] = field(default_factory=list)
    """Names of the files that are not hidden, images or not."""
    skipped_files: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(kind, reason) of the left-out files, by name."""

    def skip_file(self, name: str, reason: str, kind: str | None = None) -> None:
        """Count a file as left out."""
        self.skipped_files[name] = kind or describe_kind(name), reason


def label_by_folders(name: str, listing: Listing, choices: Choices) -> Survey:
    """Label the images of a listing by their folders.

    Raises `DataError`.
    """
    skipped_files = dict(listing.skipped_files)
    try:
        layout = detect_layout(
            (one for one in listing.names if one not in skipped_files), choices.label_depth
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    skipped_files |= layout.skipped_images
    files = []
    parts: dict[Part, set[str]] = {}
    for image, placement in sorted(layout.placements.items()):
        label = clean_label(placement.label)
        if not label:
            skipped_files[image] = f"in {placement.label!r}/", "the folder's name is blank, so it is no label"
            continue
        files.append(File(image, (label,), placement.part))
        if placement.part_folder:
            parts.setdefault(placement.part, set()).add(to_printable(placement.part_folder))
    inventory = Inventory(
        len({*listing.names, *listing.skipped_files}),
        {part: tuple(sorted(parts[part])) for part in Part if part in parts},
        "the folders' names",
        group_skipped_files(skipped_files),
        (
            *map(to_printable, layout.notes),
            *describe_spellings(placement.label for placement in layout.placements.values()),
        ),
    )
    return Survey(tuple(files), inventory)
