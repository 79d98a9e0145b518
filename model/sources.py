"""Where labelled images come from: a folder or a tar archive with one sub-folder for each label.

`Source` is what both are to the rest, and `model.table` a third kind. Hidden files, and what systems leave
behind in folders, are passed over; symbolic links are followed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import posixpath
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, Protocol

from model.examples import DataError

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
)


@dataclass(frozen=True)
class File:
    """One image of a source."""

    name: str
    """Its path inside the source, with `/`."""
    labels: tuple[str, ...]
    test: bool = False
    """Is it kept for the test?"""


class Source(Protocol):
    """Labelled images in files."""

    @property
    def name(self) -> str:
        """What people call it."""

    def files(self) -> tuple[File, ...]:
        """The images in the order of their names. Raises `DataError`."""

    def fingerprint(self) -> str:
        """Another one when an image or a label has changed, by sizes and times."""

    def contents(self, names: Sequence[str]) -> Iterator[tuple[int, Path | bytes]]:
        """Each image, or where it lies, after its index in `names`, in the order that is read the fastest."""

    def heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Each image, opened at its beginning, until the next."""


def is_hidden(name: str) -> bool:
    """Is this a path that systems make for themselves?"""
    return any(part == "__MACOSX" or (part[0] == "." and part != "..") for part in name.split("/") if part)


def _labelled(names: Iterable[str]) -> tuple[File, ...]:
    """The images among files, each labelled by the folder that it is in."""
    files = []
    for name in sorted(names):
        *above, label, file = ("", "", *name.split("/"))[-3:]
        if label and posixpath.splitext(file)[1].lower() in IMAGE_SUFFIXES:
            files.append(File(name, (label,), above == ["test"]))
    return tuple(files)


# --- on disk -------------------------------------------------------------------------------------


class OnDisk(ABC):
    """Images below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def files(self) -> tuple[File, ...]:
        """The images in the order of their names. Raises `DataError`."""

    def fingerprint(self) -> str:
        """Of all names, labels, sizes and times of change."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files():
            try:
                state = (self.root / file.name).stat()
            except OSError:  # told when it is read
                continue
            digest.update(repr((file, state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()

    def paths(self, names: Iterable[str]) -> list[Path]:
        """Where they lie."""
        return [self.root / name for name in names]

    def contents(self, names: Sequence[str]) -> Iterator[tuple[int, Path | bytes]]:
        """Where each image lies, after its index."""
        yield from enumerate(self.paths(names))

    def heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Each image that can be opened."""
        for path in self.paths(names):
            try:
                with path.open("rb") as file:
                    yield file
            except OSError:  # told when it is read
                continue


class Folder(OnDisk):
    """A folder with one sub-folder for each label."""

    @property
    def name(self) -> str:
        """Its own name, also where it is the folder at hand."""
        return self.root.absolute().name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All files that are not hidden. Raises `DataError`."""
        try:
            return tuple(sorted(_walk(self.root, "", frozenset())))
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}") from None

    def files(self) -> tuple[File, ...]:
        """The images in the order of their names."""
        return _labelled(self.names)


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The files below a folder; what a link leads back to, above it, is not entered again."""
    state = folder.stat()
    here = (state.st_dev, state.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name) or _leads_nowhere(entry):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
            elif entry.is_file():
                yield prefix + entry.name


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Is this a link to nothing, or to itself?"""
    return entry.is_symlink() and not Path(entry.path).exists()


# --- in an archive -------------------------------------------------------------------------------


class Archive:
    """A tar archive, compressed or not, with one folder for each label."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The archive's own."""
        return self.path.name

    @cached_property
    def _members(self) -> dict[str, tarfile.TarInfo]:
        """All files that are not hidden; of two of one name the later, as when it is unpacked."""
        with _open(self.path) as archive:
            everything = {str(posixpath.normpath(member.name)): member for member in archive}
            _require_end(archive)
        members = {name: _resolved(name, member, everything) for name, member in everything.items()}
        return {name: member for name, member in members.items() if member.isfile() and not is_hidden(name)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All files that are not hidden. Raises `DataError`."""
        return tuple(sorted(self._members))

    def files(self) -> tuple[File, ...]:
        """The images in the order of their names."""
        return _labelled(self.names)

    def fingerprint(self) -> str:
        """Of the archive's size and time of change."""
        state = self.path.stat()
        return f"{state.st_size}-{state.st_mtime_ns}"

    def contents(self, names: Sequence[str]) -> Iterator[tuple[int, Path | bytes]]:
        """Each image after its index, in the order in which they lie in the archive."""
        for index, file in self._opened(names):
            yield index, file.read()

    def heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Each image."""
        for _, file in self._opened(names):
            yield file

    def _opened(self, names: Sequence[str]) -> Iterator[tuple[int, IO[bytes]]]:
        members = sorted(((self._members[name], index) for index, name in enumerate(names)), key=_offset)
        with _open(self.path) as archive:
            for member, index in members:
                file = archive.extractfile(member)
                if file:
                    yield index, file


def _offset(pair: tuple[tarfile.TarInfo, int]) -> int:
    return pair[0].offset


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is neither a folder nor a tar archive nor a CSV file: {error}; "
            "unpack or repair it, or give a folder with one sub-folder of images per label"
        ) from None


def _require_end(archive: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the members end in the zeros that end an archive (POSIX.1, ustar).

    A damaged header ends the list for `tarfile` too, and would silently cost the images behind it.
    """
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short or damaged")


def _resolved(name: str, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The file that a link leads to, if the archive has it; anything else as it is."""
    if not (member.islnk() or member.issym()):
        return member
    base = posixpath.dirname(name) if member.issym() else ""
    return members.get(posixpath.normpath(posixpath.join(base, member.linkname)), member)
