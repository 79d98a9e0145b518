"""Sources of images as the user names them, and the entries of their images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Final, Protocol

from fovea.bulk.inputs.basic_entries import MAX_IMAGE_BYTES, FailedEntry, FileEntry, describe_error, to_text
from fovea.bulk.inputs.csv_table import check_csv, count_csv_rows, list_csv_images
from fovea.bulk.inputs.name_list import read_names
from fovea.bulk.inputs.parquet_table import check_parquet, count_parquet_rows, list_parquet_images
from fovea.bulk.inputs.patterns import PathPattern, expand_pattern, is_pattern
from fovea.bulk.inputs.source_files import LocalFile, SourceFile, StoreFile, connect_store
from fovea.bulk.inputs.stores import StoreEntry, create_store_entry, list_store
from fovea.bulk.inputs.tar_archive import count_tar_members, list_tar_members
from fovea.bulk.inputs.urls import HttpsAccess, UrlEntry
from fovea.bulk.inputs.zip_archive import count_zip_members, list_zip_members
from fovea.service.errors import FileError, StartError
from fovea.service.image_files import ImageEntry
from fovea.service.image_folders import join_path, walk_folder
from fovea.service.inference.image_suffixes import has_image_suffix
from fovea.service.remote.guarded_https import Resolver, UrlError
from fovea.service.remote.store_uri import StoreError, check_store_uri, has_scheme

STANDARD_INPUT: Final = "-"
"""Name of the source that is a list of names on standard input."""

_ZIP_SUFFIXES: Final = (".zip",)

_TAR_SUFFIXES: Final = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".gz", ".bz2", ".xz", ".zst")
"""Suffixes of tar archives; `.tar.gz` ends in one of them."""

_CSV_SUFFIXES: Final = (".csv", ".tsv")

_PARQUET_SUFFIXES: Final = (".parquet", ".pq")

_ARCHIVE_SUFFIXES: Final = _ZIP_SUFFIXES + _TAR_SUFFIXES

_TABLE_SUFFIXES: Final = _CSV_SUFFIXES + _PARQUET_SUFFIXES

_ZIP_SIGNATURES: Final = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")

_WEB_SCHEMES: Final = ("https://", "http://")


def list_entries(
    sources: Sequence[str],
    *,
    allowed_hosts: Sequence[str] = (),
    column: str | None = None,
    stdin: BinaryIO | None = None,
    resolver: Resolver | None = None,
    max_bytes: int = MAX_IMAGE_BYTES,
    allow_missing: bool = False,
) -> Iterator[ImageEntry]:
    """Yield the images of sources, in a stable order, in bounded memory.

    A source is a file, a folder, a pattern such as `photos/**/*.jpg`, a ZIP or tar archive, a CSV or Parquet
    table, the URI of an object store, an https URL, or `-` for a list of sources on `stdin`, which is
    standard input by default. `column` is the column of images in tables; by default it is found by its name.
    `allowed_hosts` are the hosts of https URLs, as `photos.example.com` or `*.example.com`, and `resolver`
    replaces the system's.

    Entries are picklable. No image is read before its `read`, except those of compressed tar archives, tar
    archives in stores, and tables that have images in them; those of more than `max_bytes` bytes are passed
    over. What cannot be read becomes an entry whose `read` raises `FileError`.

    Raises `StartError` before the first entry for a source that can give nothing. With `allow_missing`, an
    image file that does not exist is an entry instead.
    """
    options = _Options(HttpsAccess(tuple(allowed_hosts), resolver), column, max_bytes, stdin, allow_missing)
    created = [_create_source(text, options) for text in sources]
    if list(sources).count(STANDARD_INPUT) > 1:
        raise StartError("- can be named only once: standard input has one list")
    try:
        if allowed_hosts:
            options.access.check()
    except UrlError as error:
        raise StartError(str(error)) from None
    for source in created:
        source.check()
    return _chain(created)


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
    access: HttpsAccess = field(default_factory=HttpsAccess)
    column: str | None = None
    max_bytes: int = MAX_IMAGE_BYTES
    stdin: BinaryIO | None = None
    allow_missing: bool = False


class _Source(Protocol):
    """A source that the user names."""

    def check(self) -> None:
        """Raise `StartError` if the source can give nothing."""

    def list_entries(self) -> Iterator[ImageEntry]:
        """Yield its images."""

    def count(self) -> int | None:
        """Return about how many entries it has, or None if that takes long."""


class _Unchecked:
    """A source whose every failure is a row."""

    __slots__ = ()

    def check(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _ImageSource(_Unchecked):
    """One image."""

    entry: ImageEntry

    def list_entries(self) -> Iterator[ImageEntry]:
        yield self.entry

    def count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class _FileSource:
    """An image file of the command line."""

    path: str
    allow_missing: bool

    def check(self) -> None:
        """Raise `StartError` if there is no such file: its name may be mistyped."""
        if self.allow_missing:
            return
        try:
            os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise StartError(f"there is no file or folder {to_text(self.path)!r}") from None
        except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
            raise StartError(f"{to_text(self.path)!r}: {describe_error(error)}") from None

    def list_entries(self) -> Iterator[ImageEntry]:
        yield FileEntry(self.path, is_named=True, may_wait=True)

    def count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class _FolderSource(_Unchecked):
    path: str

    def list_entries(self) -> Iterator[ImageEntry]:
        return map(FileEntry, walk_folder(self.path))

    def count(self) -> int:
        return sum(1 for _ in walk_folder(self.path))


@dataclass(frozen=True, slots=True)
class _ArchiveSource:
    file: SourceFile
    options: _Options

    def check(self) -> None:
        """Raise `StartError` if the archive cannot be read. Damage inside is a row."""
        try:
            self._is_zip()
        except FileError as error:
            raise StartError(f"{self.file.name}: {error}") from None

    def list_entries(self) -> Iterator[ImageEntry]:
        try:
            is_zip = self._is_zip()
        except FileError as error:
            yield FailedEntry(self.file.name, str(error))
            return
        if is_zip:
            yield from list_zip_members(self.file)
        else:
            # In a store, each header of a tar archive would take a request of its own.
            as_stream = isinstance(self.file, StoreFile)
            yield from list_tar_members(self.file, self.options.max_bytes, as_stream=as_stream)

    def count(self) -> int | None:
        if isinstance(self.file, StoreFile):
            return None
        try:
            return (count_zip_members if self._is_zip() else count_tar_members)(self.file)
        except FileError:
            return 1

    def _is_zip(self) -> bool:
        """Return True for a ZIP archive by its first bytes; a damaged one is known by its suffix."""
        with self.file.open() as file:
            head = file.read_at(0, 512)
        return head.startswith(_ZIP_SIGNATURES) or (
            self.file.name.lower().endswith(_ZIP_SUFFIXES) and head[257:262] != b"ustar"
        )


@dataclass(frozen=True, slots=True)
class _TableSource:
    file: SourceFile
    create_entry: Callable[[str], ImageEntry]
    """Returns the entry of a path or a URI in the table."""
    options: _Options

    def check(self) -> None:
        """Raise `StartError` if the table cannot be read, or has no column of images."""
        try:
            (check_csv if self._is_csv() else check_parquet)(self.file, self.options.column)
        except FileError as error:
            raise StartError(f"{self.file.name}: {error}") from None

    def list_entries(self) -> Iterator[ImageEntry]:
        list_images = list_csv_images if self._is_csv() else list_parquet_images
        return list_images(self.file, self.options.column, self.create_entry, self.options.max_bytes)

    def count(self) -> int | None:
        if isinstance(self.file, StoreFile):
            return None
        return (count_csv_rows if self._is_csv() else count_parquet_rows)(self.file)

    def _is_csv(self) -> bool:
        return self.file.name.lower().endswith(_CSV_SUFFIXES)


@dataclass(frozen=True, slots=True)
class _PatternSource:
    pattern: str
    options: _Options

    def check(self) -> None:
        """Raise `StartError` if nothing matches."""
        if next(expand_pattern(self.pattern), None) is None:
            raise StartError(f"no file matches the pattern {to_text(self.pattern)!r}")

    def list_entries(self) -> Iterator[ImageEntry]:
        for path, is_folder in expand_pattern(self.pattern):
            yield from _list_or_fail(path, partial(self._create_source, path, is_folder))

    def count(self) -> int | None:
        total = 0
        for path, is_folder in expand_pattern(self.pattern):
            number = self._create_source(path, is_folder).count()
            if number is None:
                return None
            total += number
        return total

    def _create_source(self, path: str, is_folder: bool) -> _Source:
        if is_folder:
            return _FolderSource(path)
        return _create_collection(path, self.options) or _ImageSource(FileEntry(path))


@dataclass(frozen=True, slots=True)
class _StoreSource:
    uri: str
    pattern: PathPattern | None = None

    def check(self) -> None:
        """Raise `StartError` if the store cannot be reached, or has nothing at the URI."""
        try:
            next(connect_store(self.uri).walk_files(), None)
        except StoreError as error:
            raise StartError(str(error)) from None

    def list_entries(self) -> Iterator[ImageEntry]:
        return list_store(self.uri, self.pattern)

    def count(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _UrlSource:
    url: str
    access: HttpsAccess

    def check(self) -> None:
        """Raise `StartError` if the URL is not allowed."""
        try:
            self.access.check(self.url)
        except UrlError as error:
            raise StartError(f"{error}; name hosts with --allow-host") from None
        if _has_suffix(self.url, _ARCHIVE_SUFFIXES + _TABLE_SUFFIXES):
            raise StartError(f"{self.url}: archives and tables are not read from a URL; download it first")

    def list_entries(self) -> Iterator[ImageEntry]:
        yield UrlEntry(self.url, self.access)

    def count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class _ListSource:
    """A list of sources on standard input."""

    options: _Options

    def check(self) -> None:
        """Raise `StartError` if nobody writes the list."""
        if self._stream.isatty():
            raise StartError("- reads names from standard input; write `find photos -name '*.jpg' | fovea …`")

    def list_entries(self) -> Iterator[ImageEntry]:
        for number, text in read_names(self._stream):
            if text is None:
                yield FailedEntry(f"-/{number}", "the name in the list is too long")
            else:
                yield from _list_or_fail(text, partial(self._create_source, text))

    def count(self) -> None:
        return None

    @property
    def _stream(self) -> BinaryIO:
        return self.options.stdin or sys.stdin.buffer

    def _create_source(self, text: str) -> _Source:
        """Return the source of a name. A name of a list is no pattern: `[1].jpg` is a file."""
        if has_scheme(text):
            if _has_suffix(text, _ARCHIVE_SUFFIXES + _TABLE_SUFFIXES) and not text.startswith(_WEB_SCHEMES):
                return _create_uri_source(text, self.options)
            return _ImageSource(_create_uri_entry(text, self.options))
        path = _normalise_path(text)
        if has_image_suffix(path):  # spares a question to the disk for each of a million files
            return _ImageSource(FileEntry(path, is_named=True))
        if os.path.isdir(path):  # noqa: PTH112 - also for names with a null byte
            return _FolderSource(path)
        return _create_collection(path, self.options) or _ImageSource(FileEntry(path, is_named=True))


def _list_or_fail(name: str, create: Callable[[], _Source]) -> Iterator[ImageEntry]:
    """Yield the images of one of many sources. What would stop the start is a row here."""
    try:
        yield from create().list_entries()
    except StartError as error:
        yield FailedEntry(to_text(name), str(error))


def _create_source(text: str, options: _Options) -> _Source:
    """Return the source that the user means. Raises `StartError`."""
    if text == STANDARD_INPUT:
        return _ListSource(options)
    if has_scheme(text):
        return _create_uri_source(text, options)
    path = _normalise_path(text)
    if os.path.isdir(path):  # noqa: PTH112 - also for names with a null byte
        return _FolderSource(path)
    if is_pattern(path) and not os.path.lexists(path):
        return _PatternSource(path, options)
    return _create_collection(path, options) or _FileSource(path, options.allow_missing)


def _create_collection(path: str, options: _Options) -> _Source | None:
    """Return the source of a local archive or table; None for another file."""
    if _has_suffix(path, _ARCHIVE_SUFFIXES):
        return _ArchiveSource(LocalFile(path), options)
    if _has_suffix(path, _TABLE_SUFFIXES):
        folder = os.path.dirname(path)  # noqa: PTH120 - text, as all paths here

        def create_entry(text: str) -> ImageEntry:
            if has_scheme(text):
                return _create_uri_entry(text, options)
            return FileEntry(_find_file(folder, text), is_named=True)

        return _TableSource(LocalFile(path), create_entry, options)
    return None


def _find_file(folder: str, path: str) -> str:
    """Return the path of a file that a table in a folder names; the table may come from Windows."""
    joined = join_path(folder, path)
    other = path.strip().replace("\\", "/")
    return joined if other == path or os.path.lexists(joined) else join_path(folder, other)


def _create_uri_source(uri: str, options: _Options) -> _Source:
    """Return the source at a URI. Raises `StartError`."""
    if uri.lower().startswith(_WEB_SCHEMES):
        return _UrlSource(uri, options.access)
    try:
        if is_pattern(uri):
            pattern = PathPattern(uri)
            return _StoreSource(check_store_uri(pattern.folder), pattern)
        uri = check_store_uri(uri)
    except StoreError as error:
        raise StartError(str(error)) from None
    if _has_suffix(uri, _ARCHIVE_SUFFIXES):
        return _ArchiveSource(StoreFile(uri), options)
    if not _has_suffix(uri, _TABLE_SUFFIXES):
        return _StoreSource(uri)
    folder = uri.rpartition("/")[0]

    def create_entry(text: str) -> ImageEntry:
        if has_scheme(text):
            return _create_uri_entry(text, options)
        if text.startswith("/"):
            return FailedEntry(
                to_text(text), "a table in a store names images by a URI, or relative to its own folder"
            )
        return StoreEntry(folder, text.strip().replace("\\", "/").removeprefix("./"), is_named=True)

    return _TableSource(StoreFile(uri), create_entry, options)


def _create_uri_entry(uri: str, options: _Options) -> ImageEntry:
    """Return the entry of one image at a URI."""
    if uri.lower().startswith(_WEB_SCHEMES):
        return UrlEntry(uri, options.access)
    try:
        return create_store_entry(check_store_uri(uri))
    except StoreError as error:
        return FailedEntry(to_text(uri), str(error))


def _normalise_path(text: str) -> str:
    """Return a path without `./` at its start and slashes at its end, as it appears in the table."""
    while text.startswith("./") and len(text) > 2:
        text = text[2:].lstrip("/")
    return text.rstrip("/") or ("/" if text else "")


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.partition("?")[0].lower().endswith(suffixes)
