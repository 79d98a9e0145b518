"""Copying or moving of classified images into a folder for each label."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from fovea.bulk.inputs.basic_entries import FileEntry, to_path
from fovea.bulk.sorting.names import generate_names
from fovea.bulk.sorting.placing import (
    compute_digest,
    copy_file,
    has_content,
    has_same_content,
    is_same_entry,
    move_file,
    remove_partial,
    write_image,
)
from fovea.bulk.sorting.plan import PlannedFile
from fovea.errors import FileError, RequestError, StartError
from fovea.service.atomic_files import WriteError
from fovea.service.errors import to_one_line
from fovea.service.image_files import ImageEntry

_MAX_NAMES: Final = 100
"""Number of names that are tried for an image."""

_MAX_LISTINGS: Final = 10
"""Number of missing images after which the sources are not listed again for another one."""

_MAX_FAILURES: Final = 20
"""Number of images that could not be sorted whose reasons are kept."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a full disk, which the next image would meet too."""

_NO_FILE: Final = "it is no file of this machine, so it cannot be moved; use --copy-to"

_GONE: Final = "it is gone: it was deleted or moved elsewhere since the table was made"


class Action(Enum):
    """What happens to the images."""

    COPY = "copied"
    MOVE = "moved"


class Outcome(Enum):
    """What became of an image."""

    PLACED = "placed"
    """It was copied or moved."""
    PRESENT = "present"
    """It is there already, by an earlier run, or because it lies in this very folder."""


class PreviewLine(NamedTuple):
    """What would become of an image."""

    source: str
    label: str
    target: Path | None
    """The file that it would become; None if it would stay where it is."""
    reason: str = ""
    """Why it would stay."""


class SortingFailure(NamedTuple):
    """An image that was not copied or moved; it is where it was."""

    source: str
    message: str


class SortingSummary:
    """Numbers of sorted images."""

    def __init__(self) -> None:
        """Create a summary of no images."""
        self.placed: Counter[str] = Counter()
        """Number of images that were copied or moved, by label."""
        self.present_count = self.failure_count = 0
        self.failures: list[SortingFailure] = []
        """The first failures."""

    def add(self, planned: PlannedFile, outcome: Outcome) -> None:
        """Count an image."""
        if outcome is Outcome.PLACED:
            self.placed[planned.label] += 1
        else:
            self.present_count += 1

    def add_failure(self, planned: PlannedFile, message: str) -> None:
        """Count an image that is where it was."""
        self.failure_count += 1
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append(SortingFailure(planned.source, message))

    def describe(self, action: Action, folder: Path) -> str:
        """Return a sentence."""
        count, folders = self.placed.total(), len(self.placed)
        parts = [
            f"{action.value} {count:,} {'image' if count == 1 else 'images'} into {folders:,} "
            f"{'folder' if folders == 1 else 'folders'} below {folder}"
        ]
        if self.present_count:
            parts.append(f"{self.present_count:,} were there already")
        if self.failure_count:
            parts.append(f"{self.failure_count:,} could not be {action.value}")
        return "; ".join(parts)


class Sorter:
    """Copies or moves images; a run that was killed is continued by sorting the same rows again."""

    def __init__(
        self,
        folder: Path,
        action: Action,
        *,
        list_entries: Callable[[], Iterator[ImageEntry]],
        max_bytes: int,
    ) -> None:
        """Create a sorter into folders below `folder`.

        `list_entries` lists the sources once more, for images that are no files of their own. `max_bytes` is
        the largest image.
        """
        self._folder, self._action, self._max_bytes = folder, action, max_bytes
        self._list_entries = list_entries
        self._entries: Iterator[ImageEntry] | None = None
        self._missing_count = 0
        self.summary = SortingSummary()
        """Numbers of the images of the last call of `sort`, also if it was interrupted."""

    def sort(
        self, planned_files: Iterable[PlannedFile], report_progress: Callable[[], None] = lambda: None
    ) -> SortingSummary:
        """Copy or move all images, and return their numbers. An image that fails stays where it is.

        `report_progress` is called after each image. Raises `WriteError` for a full disk; what was sorted
        stays. Raises `StartError` while another process sorts into the same folder.
        """
        summary = self.summary = SortingSummary()
        self._entries, self._missing_count = None, 0
        with self._lock_folder():
            for planned in planned_files:
                try:
                    summary.add(planned, self._place(planned))
                except (FileError, RequestError) as error:
                    summary.add_failure(planned, to_one_line(error))
                except OSError as error:
                    if error.errno in _FULL:
                        raise WriteError(
                            f"cannot write into {planned.target.parent}: {error.strerror}; "
                            f"{summary.describe(self._action, self._folder)}; "
                            "the same command with --resume goes on"
                        ) from None
                    summary.add_failure(planned, error.strerror or to_one_line(error))
                report_progress()
        return summary

    def preview(self, planned_files: Iterable[PlannedFile]) -> Iterator[PreviewLine]:
        """Yield what `sort` would do with each image, without doing it.

        An image that is no file of its own is taken to be readable. Memory grows with the number of images.
        """
        claimed: dict[Path, str] = {}
        for planned in planned_files:
            try:
                target = self._find_free_target(planned, claimed)
            except FileError as error:
                yield PreviewLine(planned.source, planned.label, None, str(error))
                continue
            if target is None:
                yield PreviewLine(planned.source, planned.label, None, "it is there already")
            else:
                claimed[target] = planned.source
                yield PreviewLine(planned.source, planned.label, target)

    # --- one image -------------------------------------------------------------------------------

    def _place(self, planned: PlannedFile) -> Outcome:
        """Copy or move one image. Raises `FileError`, `RequestError` and `OSError`."""
        if self._was_moved(planned):
            remove_partial(planned.target, compute_digest(planned.source))
            return Outcome.PRESENT
        source = to_path(planned.source)
        if not os.path.lexists(source):
            entry = self._find_entry(planned.source)
            if not isinstance(entry, FileEntry):
                return self._write_entry(planned, entry)
            source = entry.path  # it came back in this moment
            self._check_movable(source)
        planned.target.parent.mkdir(parents=True, exist_ok=True)
        digest = compute_digest(planned.source)
        for candidate in _list_targets(planned):
            if is_same_entry(source, candidate):
                return Outcome.PRESENT
            if self._action is Action.MOVE:
                if move_file(source, candidate, digest=digest):
                    return Outcome.PLACED
            elif copy_file(source, candidate, digest=digest):
                return Outcome.PLACED
            elif has_same_content(source, candidate):
                remove_partial(candidate, digest)
                return Outcome.PRESENT
        raise FileError(f"{_MAX_NAMES} files have its name in {planned.target.parent}")

    def _write_entry(self, planned: PlannedFile, entry: ImageEntry) -> Outcome:
        if self._action is Action.MOVE:
            raise FileError(_NO_FILE)
        content = entry.read(self._max_bytes)
        planned.target.parent.mkdir(parents=True, exist_ok=True)
        digest = compute_digest(planned.source)
        for candidate in _list_targets(planned):
            if write_image(content, candidate, digest=digest):
                return Outcome.PLACED
            if has_content(candidate, content):
                remove_partial(candidate, digest)
                return Outcome.PRESENT
        raise FileError(f"{_MAX_NAMES} files have its name in {planned.target.parent}")

    def _was_moved(self, planned: PlannedFile) -> bool:
        """Return whether an earlier run moved this image. Raises `FileError` if it cannot be moved."""
        source = to_path(planned.source)
        if self._action is Action.COPY:
            return False
        if os.path.lexists(source):
            self._check_movable(source)
            return False
        if _is_uri_or_member(source):
            raise FileError(_NO_FILE)
        if not _has_target(planned):
            raise FileError(_GONE)
        return True

    def _check_movable(self, source: str) -> None:
        """Raise `FileError` for a move of a symbolic link, which may not lead to its image elsewhere."""
        if self._action is Action.MOVE and Path(source).is_symlink():
            raise FileError("it is a symbolic link, which is not moved; use --copy-to")

    def _find_entry(self, name: str) -> ImageEntry:
        """Return the entry of an image that is no file by this name.

        Rows and entries have the same order, so that the sources are listed once for all images, and once
        more after each of the first images that are missing. Raises `FileError` if there is no such image.
        """
        if self._missing_count <= _MAX_LISTINGS:
            if self._entries is None:
                self._entries = self._list_entries()
            for entry in self._entries:
                if entry.name == name:
                    return entry
            self._entries = None
            self._missing_count += 1
        raise FileError("it is no longer in the sources")

    def _find_free_target(self, planned: PlannedFile, claimed: Mapping[Path, str]) -> Path | None:
        """Return the file that an image would become, or None if it is there already.

        `claimed` are the sources of files that are planned. Raises `FileError` if it cannot be moved.
        """
        if self._was_moved(planned):
            return None
        path = to_path(planned.source)
        for candidate in _list_targets(planned):
            source = claimed.get(candidate)
            if source is None and not os.path.lexists(candidate):
                return candidate
            if source is None and is_same_entry(path, candidate):
                return None
            if self._action is Action.COPY:
                with suppress(OSError):  # an image in an archive is no file
                    if has_same_content(path, candidate if source is None else Path(to_path(source))):
                        return None
        raise FileError(f"{_MAX_NAMES} files have its name in {planned.target.parent}")

    @contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Hold a lock on the folder, which the kernel releases however the process ends.

        Raises `WriteError` and `StartError`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise WriteError(f"cannot write into {self._folder}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StartError(f"another run sorts into {self._folder}; wait for its end") from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(descriptor)


def _is_uri_or_member(source: str) -> bool:
    return "://" in source or any(folder.is_file() for folder in Path(source).parents)


def _has_target(planned: PlannedFile) -> bool:
    """Return whether one of the usual two names of the image is taken."""
    return any(map(os.path.lexists, islice(_list_targets(planned), 2)))


def _list_targets(planned: PlannedFile) -> Iterator[Path]:
    """Return the files that an image may become, in the order in which they are tried."""
    names = generate_names(planned.target.name, planned.source)
    return map(planned.target.with_name, islice(names, _MAX_NAMES))
