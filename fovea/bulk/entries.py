"""An image to classify in bulk: its name in the table, and how to read it."""

from __future__ import annotations

from typing import Protocol


class ImageEntry(Protocol):
    """One image of a source; picklable, so that another process or machine can read it."""

    @property
    def name(self) -> str:
        """Path or URI in the table; for a file in an archive, the archive's path, `/`, and the member's."""

    @property
    def is_named(self) -> bool:
        """Whether the user named just this image. Other files that are no images may be skipped."""

    def read(self, max_bytes: int) -> bytes:
        """Return the encoded image. Raises `FileError`, and `BodyTooLarge` for more than `max_bytes` bytes.

        Called at most once, in any thread.
        """
