"""Sources of images as the user names them, and the entries of their images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fovea.bulk.entries import ImageEntry
from fovea.bulk.inputs.archive_files import ArchiveFile, LocalArchive
from fovea.bulk.inputs.basic_entries import MAX_IMAGE_BYTES, FailedEntry, FileEntry, to_text
from fovea.bulk.inputs.patterns import expand_pattern, is_pattern
from fovea.bulk.inputs.tar_archive import count_tar_members, list_tar_members
from fovea.bulk.inputs.zip_archive import count_zip_members, list_zip_members
from fovea.service.errors import FileError, StartError
from fovea.service.image_folders import walk_folder

_ZIP_SUFFIXES: Final = (".zip",)

_TAR_SUFFIXES: Final = (
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".tzst",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
)
"""Suffixes of tar archives; `.tar.gz` ends in one of them."""

_ZIP_SIGNATURES: Final = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")


def list_entries(
    sources: Sequence[str],
    *,
    max_bytes: int = MAX_IMAGE_BYTES,
) -> Iterator[ImageEntry]:
    """Yield the images of sources, in a stable order, in bounded memory.

    A source is a file, a folder, a pattern or an archive. Entries are picklable, and nothing of an image is
    read before `read`, except for images in compressed tar archives; those of more than `max_bytes` bytes are
    passed over. What cannot be read becomes an entry whose `read` raises `FileError`.

    Raises `StartError` before the first entry for a source that can give nothing.
    """
    options = _Options(max_bytes)
    return _chain([_create_source(text, options) for text in sources])


def count_entries(sources: Sequence[str]) -> int | None:
    """Return about how many entries the sources have, without reading images; None if that is not cheap.

    Folders are listed once more, so call it in another thread. Files that are no images count too.
    """
    total = 0
    for text in sources:
        number = _create_source(text, _Options()).count()
        if number is None:
            return None
        total += number
    return total


def _chain(sources: Sequence[_Source]) -> Iterator[ImageEntry]:
    for source in sources:
        yield from source.list_entries()


@dataclass(frozen=True, slots=True)
class _Options:
    max_bytes: int = MAX_IMAGE_BYTES


class _Source(Protocol):
    """A source that the user names."""

    def list_entries(self) -> Iterator[ImageEntry]:
        """Yield its images."""

    def count(self) -> int | None:
        """Return about how many entries it has, or None if that takes long."""


@dataclass(frozen=True, slots=True)
class _FileSource:
    path: str

    def list_entries(self) -> Iterator[ImageEntry]:
        yield FileEntry(self.path, is_named=True)

    def count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class _FolderSource:
    path: str

    def list_entries(self) -> Iterator[ImageEntry]:
        return map(FileEntry, walk_folder(self.path))

    def count(self) -> int:
        return sum(1 for _ in walk_folder(self.path))


@dataclass(frozen=True, slots=True)
class _ArchiveSource:
    archive: ArchiveFile
    options: _Options

    def list_entries(self) -> Iterator[ImageEntry]:
        try:
            is_zip = self._is_zip()
        except FileError as error:
            yield FailedEntry(self.archive.name, str(error))
            return
        if is_zip:
            yield from list_zip_members(self.archive)
        else:
            yield from list_tar_members(self.archive, self.options.max_bytes)

    def count(self) -> int | None:
        try:
            return (count_zip_members if self._is_zip() else count_tar_members)(self.archive)
        except FileError:
            return 1

    def _is_zip(self) -> bool:
        """Return True for a ZIP archive by its first bytes; a damaged one is known by its suffix."""
        with self.archive.open() as file:
            head = file.read_at(0, 512)
        return head.startswith(_ZIP_SIGNATURES) or (
            self.archive.name.lower().endswith(_ZIP_SUFFIXES) and head[257:262] != b"ustar"
        )


@dataclass(frozen=True, slots=True)
class _PatternSource:
    pattern: str
    options: _Options

    def list_entries(self) -> Iterator[ImageEntry]:
        for path, is_folder in expand_pattern(self.pattern):
            if is_folder:
                yield from _FolderSource(path).list_entries()
            elif _is_archive(path):
                yield from _ArchiveSource(LocalArchive(path), self.options).list_entries()
            else:
                yield FileEntry(path)

    def count(self) -> int | None:
        total = 0
        for path, is_folder in expand_pattern(self.pattern):
            number: int | None = 1
            if is_folder:
                number = _FolderSource(path).count()
            elif _is_archive(path):
                number = _ArchiveSource(LocalArchive(path), self.options).count()
            if number is None:
                return None
            total += number
        return total


def _create_source(text: str, options: _Options) -> _Source:
    """Return the source that the user means. Raises `StartError`."""
    path = _normalise_path(text)
    if os.path.isdir(path):  # noqa: PTH112 - also for names with a null byte
        return _FolderSource(path)
    if _is_archive(path):
        return _ArchiveSource(LocalArchive(path), options)
    if is_pattern(path) and not os.path.lexists(path):
        if next(expand_pattern(path), None) is None:
            raise StartError(f"no file matches the pattern {to_text(text)!r}")
        return _PatternSource(path, options)
    return _FileSource(path)


def _normalise_path(text: str) -> str:
    """Return a path without `./` at its start and slashes at its end, as it appears in the table."""
    while text.startswith("./") and len(text) > 2:
        text = text[2:].lstrip("/")
    return text.rstrip("/") or ("/" if text else "")


def _is_archive(path: str) -> bool:
    return path.lower().endswith((*_ZIP_SUFFIXES, *_TAR_SUFFIXES))
