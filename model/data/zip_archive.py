"""ZIP archives with one folder for each label, read without unpacking to disk."""

from __future__ import annotations

import lzma
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Final

from fovea.model.data.examples import DataError
from fovea.model.data.formats import HEAD_BYTES, explain_rejection, has_image_suffix
from fovea.model.data.sources import EncodedImage, Listing
from fovea.model.data.tar_archive import Archive, normalize_member_name, skip_member
from fovea.service.errors import BadImage, to_one_line

_SIGNATURES: Final = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
"""Signatures of an archive, an empty archive and a multi-file archive (APPNOTE.TXT 4.3)."""

_COMPRESSION_METHODS: Final = frozenset(
    {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
)
"""Compression methods that Python can decompress."""

_UTF8_FLAG: Final = 0x800
"""Flag for a name in UTF-8; otherwise the name is in an old code page."""

_ENCRYPTED_FLAG: Final = 0x1

_BOMB_BYTES: Final = 16 << 20
_BOMB_RATIO: Final = 200
"""Compression ratio that no real image above `_BOMB_BYTES` reaches; deflate's maximum is 1,032."""

_MAX_LINKS: Final = 8


def is_zip(path: Path) -> bool:
    """Return whether the file begins with a ZIP signature."""
    try:
        with path.open("rb") as file:
            return file.read(4) in _SIGNATURES
    except OSError:
        return False


class ZipArchive(Archive):
    """A ZIP archive with one folder for each label."""

    @cached_property
    def _zip_members(self) -> tuple[dict[str, zipfile.ZipInfo], Listing]:
        """Members that are not hidden, and the listing.

        Of two members with the same name, the later one counts, as in unpacking.
        """
        listing = Listing()
        members: dict[str, zipfile.ZipInfo] = {}
        with _open_zip(self.path) as archive:
            all_members = {
                normalize_member_name(_decode_name(member)): member for member in archive.infolist()
            }
            for name, member in all_members.items():
                if member.is_dir() or skip_member(name, member.file_size, listing):
                    continue
                self._require_readable(member)
                target = _resolve_link(archive, name, all_members)
                if target is None:
                    listing.skip_file(name, "a link to a missing member of the archive", "link")
                elif _is_bomb(target):
                    listing.skip_file(
                        name, f"it unpacks to over {_BOMB_RATIO} times its size, as no image does"
                    )
                else:
                    members[name] = target
                    listing.names.append(name)
                    if not has_image_suffix(name) and (reason := _explain_member_rejection(archive, target)):
                        listing.skip_file(name, reason)
        listing.names.sort()
        return members, listing

    def _require_readable(self, member: zipfile.ZipInfo) -> None:
        if member.flag_bits & _ENCRYPTED_FLAG:
            raise DataError(f"{self.path} is encrypted; unpack it with its password, and pass the folder")
        if member.compress_type not in _COMPRESSION_METHODS:
            raise DataError(
                f"{self.path} has a member with compression method {member.compress_type}, which is not "
                "supported; unpack it, and pass the folder"
            )

    @property
    def listing(self) -> Listing:
        """The listing of all files.

        Raises `DataError`.
        """
        return self._zip_members[1]

    def _sort_members(self, names: Sequence[str]) -> list[tuple[int, zipfile.ZipInfo]]:
        """Return the indices and members in archive order."""
        members = [(index, self._zip_members[0][name]) for index, name in enumerate(names)]
        return sorted(members, key=lambda pair: pair[1].header_offset)

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index and the content of each image, in archive order."""
        with _open_zip(self.path) as archive:
            for index, member in self._sort_members(names):
                content: EncodedImage
                try:
                    content = archive.read(member)
                except _DAMAGE_ERRORS as error:
                    content = BadImage(f"it is damaged in the archive: {to_one_line(error)}")
                yield index, content

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image that can be opened."""
        with _open_zip(self.path) as archive:
            for _, member in self._sort_members(names):
                try:
                    file = archive.open(member)
                except _DAMAGE_ERRORS:  # reported when the image is read
                    continue
                with file:
                    yield file


_DAMAGE_ERRORS: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, zlib.error, EOFError) as error:
        raise DataError(
            f"{path} is not a complete ZIP archive: {error}; unpack or repair it, or give a folder with one "
            "sub-folder of images per label"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _decode_name(member: zipfile.ZipInfo) -> str:
    """Return a member's name; some programs, such as macOS's Finder, write UTF-8 without the flag."""
    if member.flag_bits & _UTF8_FLAG:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _resolve_link(
    archive: zipfile.ZipFile, name: str, members: dict[str, zipfile.ZipInfo]
) -> zipfile.ZipInfo | None:
    """Return the member, or the member that a symbolic link leads to; None if the archive has none."""
    for _ in range(_MAX_LINKS):
        member = members.get(name)
        if member is None or member.is_dir():
            return None
        mode = member.external_attr >> 16
        if not stat.S_ISLNK(mode):
            return member
        target = archive.read(member)[:4096].decode(errors="surrogateescape")
        name = normalize_member_name(posixpath.join(posixpath.dirname(name), target))
    return None


def _is_bomb(member: zipfile.ZipInfo) -> bool:
    return member.file_size > _BOMB_BYTES and member.file_size > _BOMB_RATIO * max(1, member.compress_size)


def _explain_member_rejection(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str | None:
    try:
        with archive.open(member) as file:
            return explain_rejection(file.read(HEAD_BYTES))
    except _DAMAGE_ERRORS:
        return "it is damaged in the archive"
