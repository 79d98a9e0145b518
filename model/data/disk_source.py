"""Images on disk: a folder with one sub-folder for each label, and the base class of other sources on disk.

Hidden files and operating system files are left out. Symbolic links are followed.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO

from fovea.model.data.choices import Choices
from fovea.model.data.clutter import find_clutter
from fovea.model.data.examples import DataError
from fovea.model.data.formats import HEAD_BYTES, explain_rejection, has_image_suffix
from fovea.model.data.inventory import File, to_printable
from fovea.model.data.sources import HIDDEN_REASON, EncodedImage, Listing, Survey, label_by_folders


class DiskSource(ABC):
    """A source of images below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    @abstractmethod
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """

    def list_files(self) -> tuple[File, ...]:
        """Return the images, sorted by name.

        Raises `DataError`.
        """
        return self.survey.files

    def fingerprint(self) -> str:
        """Return a digest of all names, labels, sizes and modification times."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.list_files():
            try:
                state = (self.root / file.name).stat()
            except OSError:  # reported when the image is read
                continue
            # the cache key: a change of the repr of `File` would rebuild all pixel caches
            digest.update(repr((file, state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()

    def resolve_paths(self, names: Iterable[str]) -> list[Path]:
        """Return the paths of the named images."""
        return [self.root / name for name in names]

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index and the path of each image."""
        yield from enumerate(self.resolve_paths(names))

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image that can be opened."""
        for path in self.resolve_paths(names):
            try:
                with path.open("rb") as file:
                    yield file  # closed when the consumer asks for the next file
            except OSError:  # reported when the image is read
                continue


class Folder(DiskSource):
    """A folder with one sub-folder for each label."""

    def __init__(self, root: Path, choices: Choices | None = None) -> None:
        super().__init__(root)
        self.choices = choices or Choices()

    @property
    def name(self) -> str:
        """The folder's own name, even for the current folder."""
        return to_printable(self.root.absolute().name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files that are not hidden.

        Raises `DataError`.
        """
        return tuple(self._listing.names)

    @cached_property
    def _listing(self) -> Listing:
        listing = Listing()
        try:
            _walk_folder(self.root, "", frozenset(), listing)
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}") from None
        listing.names.sort()
        return listing

    @cached_property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """
        for name in self._listing.names:
            if not has_image_suffix(name) and (reason := explain_file_rejection(self.root / name)):
                self._listing.skip_file(name, reason)
        return label_by_folders(self.name, self._listing, self.choices)


def explain_file_rejection(path: Path) -> str | None:
    """Return why a file is not a supported image; None if it is one."""
    try:
        with path.open("rb") as file:
            return explain_rejection(file.read(HEAD_BYTES))
    except OSError as error:
        return error.strerror or "it cannot be opened"


def _walk_folder(folder: Path, prefix: str, parent_ids: frozenset[tuple[int, int]], listing: Listing) -> None:
    """List the files below a folder; a link back to a parent folder is not followed."""
    state = folder.stat()
    folder_id = (state.st_dev, state.st_ino)
    if folder_id in parent_ids:
        listing.skip_file(prefix.rstrip("/"), "a link to a folder above", "link")
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            kind = find_clutter(entry.name)
            if kind and entry.is_dir(follow_symlinks=False):
                _walk_clutter(Path(entry.path), name, f"in {entry.name}/", listing)
            elif kind:
                listing.skip_file(name, HIDDEN_REASON, kind)
            elif entry.is_symlink() and not Path(entry.path).exists():
                listing.skip_file(name, "a broken link", "link")
            elif entry.is_dir():
                _walk_folder(Path(entry.path), f"{name}/", parent_ids | {folder_id}, listing)
            elif entry.is_file():
                listing.names.append(name)
            else:
                listing.skip_file(name, "a device, a socket or a pipe")


def _walk_clutter(folder: Path, name: str, kind: str, listing: Listing) -> None:
    """Count the files below a system folder, as far as they can be listed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _walk_clutter(Path(entry.path), f"{name}/{entry.name}", kind, listing)
                else:
                    listing.skip_file(f"{name}/{entry.name}", HIDDEN_REASON, kind)
    except OSError:  # for example lost+found, which only root can list
        listing.skip_file(name, f"{HIDDEN_REASON}, and it cannot be listed", kind)
