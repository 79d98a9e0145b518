"""Tar archives with one folder for each label, read without unpacking to disk.

`Archive` is also the base class of ZIP archives.
"""

from __future__ import annotations

import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

from fovea.model.data.choices import Choices
from fovea.model.data.clutter import find_clutter
from fovea.model.data.examples import DataError
from fovea.model.data.formats import HEAD_BYTES, explain_rejection, has_image_suffix
from fovea.model.data.inventory import File, to_printable
from fovea.model.data.sources import (
    HIDDEN_REASON,
    MAX_BYTES,
    EncodedImage,
    Listing,
    Survey,
    label_by_folders,
)


class Archive:
    """A tar archive, compressed or not, with one folder for each label."""

    def __init__(self, path: Path, choices: Choices | None = None) -> None:
        self.path, self.choices = path, choices or Choices()

    @property
    def name(self) -> str:
        """The archive's file name."""
        return to_printable(self.path.name)

    @cached_property
    def _members(self) -> tuple[dict[str, tarfile.TarInfo], Listing]:
        """Members that are not hidden, and the listing.

        Of two members with the same name, the later one counts, as in unpacking.
        """
        all_members: dict[str, tarfile.TarInfo] = {}
        rejections: dict[int, str | None] = {}
        with _open_tar(self.path) as archive:
            for member in archive:
                all_members[normalize_member_name(member.name)] = member
                if member.isreg() and not has_image_suffix(member.name):
                    file = archive.extractfile(member)
                    rejections[member.offset] = explain_rejection(file.read(HEAD_BYTES)) if file else None
            _require_end_block(archive)
        listing = Listing()
        members: dict[str, tarfile.TarInfo] = {}
        for name, member in all_members.items():
            target = _resolve_link(name, member, all_members)
            if target.isdir():
                if member.issym():
                    listing.skip_file(name, "a link to a folder is not followed in an archive", "link")
                continue
            if skip_member(name, target.size, listing):
                continue
            if not target.isfile():
                if target.issym() or target.islnk():
                    listing.skip_file(name, "a link to a missing member of the archive", "link")
                else:
                    listing.skip_file(name, "a device or a pipe")
                continue
            members[name] = target
            listing.names.append(name)
            if not has_image_suffix(name) and (reason := rejections.get(target.offset)):
                listing.skip_file(name, reason)
        listing.names.sort()
        return members, listing

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files that are not hidden.

        Raises `DataError`.
        """
        return tuple(self.listing.names)

    @property
    def listing(self) -> Listing:
        """The listing of all files.

        Raises `DataError`.
        """
        return self._members[1]

    @cached_property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """
        return label_by_folders(self.name, self.listing, self.choices)

    def list_files(self) -> tuple[File, ...]:
        """Return the images, sorted by name.

        Raises `DataError`.
        """
        return self.survey.files

    def fingerprint(self) -> str:
        """Return a fingerprint of the archive's size and modification time."""
        state = self.path.stat()
        return f"{state.st_size}-{state.st_mtime_ns}"

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index and the content of each image, in archive order."""
        for index, file in self._open_members(names):
            yield index, file.read()

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image as an open file."""
        for _, file in self._open_members(names):
            yield file

    def _open_members(self, names: Sequence[str]) -> Iterator[tuple[int, IO[bytes]]]:
        members_by_name = self._members[0]
        members = sorted(
            ((members_by_name[name], index) for index, name in enumerate(names)), key=_get_offset
        )
        with _open_tar(self.path) as archive:
            for member, index in members:
                file = archive.extractfile(member)
                if file:
                    yield index, file  # the consumer reads before it asks for the next: one shared position


def normalize_member_name(name: str) -> str:
    """Return a member's normalised path, without `.`, `//` and a leading `/`."""
    return posixpath.normpath(name.lstrip("/"))


def skip_member(name: str, size: int, listing: Listing) -> bool:
    """Leave out a member that is hidden, leads out of the archive or is too large; return whether it is."""
    if name.split("/")[0] == "..":
        listing.skip_file(name, "its name leads out of the archive", "in ../")
    elif kind := find_clutter(name):
        listing.skip_file(name, HIDDEN_REASON, kind)
    elif size > MAX_BYTES:
        listing.skip_file(name, f"over {MAX_BYTES >> 20} MB, the limit for an image's file")
    else:
        return False
    return True


def _get_offset(pair: tuple[tarfile.TarInfo, int]) -> int:
    return pair[0].offset


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is neither a folder nor a tar archive, a ZIP archive or a CSV file: {error}; "
            "unpack or repair it, or give a folder with one sub-folder of images per label"
        ) from None


def _require_end_block(archive: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the archive ends with a block of zeros (POSIX.1, ustar).

    `tarfile` also stops at a damaged header and would silently drop the images behind it.
    """
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short or damaged")


def _resolve_link(name: str, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the member that a link leads to, if the archive has it; otherwise the member itself."""
    for _ in range(_MAX_LINKS):
        if not (member.islnk() or member.issym()):
            break
        base = posixpath.dirname(name) if member.issym() else ""
        name = normalize_member_name(posixpath.join(base, member.linkname))
        member = members.get(name, member)
    return member


_MAX_LINKS: Final = 8
"""Maximum number of links in a chain; some chains are circular."""
