"""Images in tar archives, in place and in bounded memory.

`tarfile` keeps every member in memory, and reads an extended header of any size that the archive states; a
compressed archive of 1 MB can state 1 GB. Here headers are limited, and `tarfile` only parses their blocks.

A plain archive is read by offsets: an entry holds the place of its member. A compressed archive is read once,
as a stream, and its entries hold their content.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple, Protocol, cast

from fovea.bulk.inputs.basic_entries import (
    BytesEntry,
    FailedEntry,
    LargeEntry,
    SpecialEntry,
    clean_member_name,
    describe_error,
    is_hidden_member,
)
from fovea.bulk.inputs.source_files import OpenFile, SourceFile, WindowReader
from fovea.bulk.inputs.xz_stream import XzStream
from fovea.service.errors import FileError, UnsupportedFormat
from fovea.service.image_files import ImageEntry, check_image_size
from fovea.service.inference.image_format import identify_format

_BLOCK_BYTES: Final = tarfile.BLOCKSIZE

_MAX_HEADER_BYTES: Final = 1 << 20
"""Largest extended header in bytes. Real ones have a few names of at most 4 kB each."""

_MAX_HEADERS: Final = 16
"""Largest number of extended headers of one member."""

_SKIP_BYTES: Final = 1 << 20
"""Bytes of a stream that are passed over at once."""

_SMALL_WINDOW_BYTES: Final = 16 << 10
"""Bytes that are read for a header of a plain archive: several small members lie in one window."""

_HEAD_BYTES: Final = 64
"""Bytes from which a format is recognised."""

_EXTENSIONS: Final = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    }
)
"""Types of headers that describe the member behind them, or all members."""

_KINDS_WITHOUT_CONTENT: Final = frozenset(
    {
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
    }
)

_READING_ERRORS: Final = (zlib.error, lzma.LZMAError, EOFError, OSError)
"""Errors of damaged and of unreadable streams."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar archive without compression."""

    archive: SourceFile
    member: str
    """Path in the archive."""
    offset: int
    """Where the content begins in the archive."""
    size: int
    """Size in bytes."""
    is_named: bool = False

    @property
    def name(self) -> str:
        """Path of the archive and of the member."""
        return f"{self.archive.name}/{self.member}"

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError`, and `BodyTooLarge` before anything is read."""
        check_image_size(self.size, max_bytes, "the file")
        with self.archive.open() as archive:
            content = archive.read_at(self.offset, self.size)
        if len(content) < self.size:
            raise FileError("the file is damaged in the archive: it is cut short")
        return content


def list_tar_members(archive: SourceFile, max_bytes: int, *, as_stream: bool = False) -> Iterator[ImageEntry]:
    """Yield the files of a tar archive, compressed or not, in the order of the archive.

    The content of a compressed archive, and with `as_stream` of every archive, is read with the listing; a
    file of more than `max_bytes` bytes is then passed over. Damage becomes one entry with the error, behind
    the files before it.
    """
    try:
        with archive.open_stream() as file:
            decompress = _find_decompressor(file)
            if decompress is not None or as_stream:
                stream = file if decompress is None else decompress(file)
                yield from _list_members(archive, _StreamReader(archive.name, stream, max_bytes))
            else:
                with archive.open() as plain:
                    yield from _list_members(archive, _PlainReader(archive, plain))
    except FileError as error:
        yield FailedEntry(archive.name, str(error))


def count_tar_members(archive: SourceFile) -> int | None:
    """Return the number of files in an archive without compression, from its headers; otherwise None."""
    try:
        with archive.open_stream() as file:
            if _find_decompressor(file) is not None:
                return None
    except FileError:
        return None
    return sum(1 for _ in list_tar_members(archive, 0))


def _find_decompressor(file: BinaryIO) -> Callable[[BinaryIO], BinaryIO] | None:
    """Return a function that unpacks the stream, or None for an archive without compression."""
    try:
        head = _read_fully(file, 6)
        file.seek(0)
    except OSError as error:
        raise FileError(f"the file cannot be read: {describe_error(error)}") from None
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise FileError(
            "the archive is compressed with zstd, which is not supported; unpack it with `zstd -d`"
        )
    return next((one for signature, one in _DECOMPRESSORS.items() if head.startswith(signature)), None)


def _open_gzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _open_bzip2(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(file))


def _open_xz(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(XzStream(file)))


_DECOMPRESSORS: Final = {b"\x1f\x8b": _open_gzip, b"BZh": _open_bzip2, b"\xfd7zXZ\0": _open_xz}
"""Functions that unpack a stream, by its first bytes. Each unpacks no more than it is asked for."""


class _Reader(Protocol):
    """Reads an archive forwards. All methods raise `FileError` where the archive ends too early."""

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer only at the end."""

    def read_entry(self, member: str, size: int) -> ImageEntry:
        """Return the entry of a file whose content comes next, and pass over the content."""

    def skip(self, size: int) -> None:
        """Pass over bytes."""


class _PlainReader:
    """Reads headers of an archive without compression, and no content."""

    def __init__(self, archive: SourceFile, file: OpenFile) -> None:
        self._archive, self._size = archive, file.size
        self._reader = WindowReader(file, window_bytes=_SMALL_WINDOW_BYTES)

    def read(self, size: int) -> bytes:
        return self._reader.read(size)

    def read_entry(self, member: str, size: int) -> ImageEntry:
        offset = self._reader.offset
        self.skip(size)
        return TarMember(self._archive, member, offset, size)

    def skip(self, size: int) -> None:
        if self._reader.offset + size > self._size:
            raise FileError("it is cut short")
        self._reader.offset += size


class _StreamReader:
    """Reads an archive as a stream, with the content of its files."""

    def __init__(self, archive: str, stream: BinaryIO, max_bytes: int) -> None:
        self._archive, self._stream, self._max_bytes = archive, stream, max_bytes

    def read(self, size: int) -> bytes:
        return _read_fully(self._stream, size)

    def read_entry(self, member: str, size: int) -> ImageEntry:
        name = f"{self._archive}/{member}"
        if size > self._max_bytes:
            self.skip(size)
            return LargeEntry(name, self._max_bytes)
        head = self._read_exactly(min(size, _HEAD_BYTES))
        try:
            if head:
                identify_format(head)
        except UnsupportedFormat as error:  # what is no image need not wait in memory
            self.skip(size - len(head))
            return SpecialEntry(name, str(error))
        return BytesEntry(name, head + self._read_exactly(size - len(head)))

    def skip(self, size: int) -> None:
        while size:
            size -= len(self._read_exactly(min(size, _SKIP_BYTES)))

    def _read_exactly(self, size: int) -> bytes:
        content = self.read(size)
        if len(content) < size:
            raise FileError("it is cut short")
        return content


def _read_fully(file: BinaryIO, size: int) -> bytes:
    """Return the next bytes of a stream, which may give a part at each reading."""
    content = file.read(size)
    if len(content) == size:
        return content
    parts = [content]
    while (left := size - sum(map(len, parts))) and (part := file.read(left)):
        parts.append(part)
    return b"".join(parts)


def _list_members(archive: SourceFile, reader: _Reader) -> Iterator[ImageEntry]:
    number = 0
    try:
        while (member := _read_header(reader)) is not None:
            entry = _read_member(archive.name, member, reader)
            number += 1
            if entry is not None:
                yield entry
    except (FileError, *_READING_ERRORS) as error:
        yield FailedEntry(
            archive.name,
            f"the tar archive is damaged or incomplete behind its member number {number}: "
            f"{describe_error(error)}",
        )


class _Member(NamedTuple):
    name: str
    kind: bytes
    """Type of tar's header (POSIX.1, ustar)."""
    size: int
    is_sparse: bool


def _read_member(archive: str, member: _Member, reader: _Reader) -> ImageEntry | None:
    """Return the entry of a member, or None for a folder and for clutter; pass over its content."""
    has_content = member.kind not in _KINDS_WITHOUT_CONTENT
    padding = -member.size % _BLOCK_BYTES if has_content else 0
    name = clean_member_name(member.name)
    entry: ImageEntry | None = None
    if member.kind == tarfile.DIRTYPE or (name is not None and is_hidden_member(name)):
        pass
    elif name is None:
        shown = clean_member_name(member.name.replace("..", "__")) or "member"
        entry = FailedEntry(
            f"{archive}/{shown}", "the file's name leads out of the archive or is empty", is_named=False
        )
    elif not has_content:
        entry = SpecialEntry(f"{archive}/{name}", "a link or a device in an archive is not read")
    elif member.is_sparse:
        entry = FailedEntry(
            f"{archive}/{name}", "the file has holes (a sparse file); unpack the archive", is_named=False
        )
    else:
        entry = reader.read_entry(name, member.size)
        reader.skip(padding)
        return entry
    if has_content:
        reader.skip(member.size + padding)
    return entry


def _read_header(reader: _Reader) -> _Member | None:
    """Return the next member, or None at the end mark. Raises `FileError`."""
    name: str | None = None
    size: int | None = None
    is_sparse = False
    for _ in range(_MAX_HEADERS):
        block = reader.read(_BLOCK_BYTES)
        if len(block) < _BLOCK_BYTES:
            raise FileError("it is cut short" if block else "it has no end mark")
        if not any(block):
            return None
        header = _parse_header(block)
        if header.size < 0:
            raise FileError("a size is negative")
        if header.type in _EXTENSIONS:
            content = _read_extension(reader, header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = content.split(b"\0", 1)[0].decode(errors="surrogateescape")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                values = _parse_pax(content)
                size = values.size if values.size is not None else size
                name = values.name if values.name is not None else name
                is_sparse |= values.is_sparse
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            is_sparse = True
            _skip_sparse_maps(reader, block)
        return _Member(
            header.name if name is None else name,
            header.type,
            header.size if size is None else size,
            is_sparse,
        )
    raise FileError(f"a file has more than {_MAX_HEADERS} headers")


class _Header(NamedTuple):
    name: str
    type: bytes
    size: int


def _parse_header(block: bytes) -> _Header:
    """Parse a header (POSIX.1, ustar). Raises `FileError`.

    The common kind is parsed here, because `tarfile` takes 50 microseconds; `tarfile` parses all others.
    """
    kind = block[156:157]
    try:
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if kind == tarfile.REGTYPE and checksum == _parse_octal(block[148:156]):
            name = block[:100].partition(b"\0")[0]
            if prefix := block[345:500].partition(b"\0")[0]:
                name = prefix + b"/" + name
            return _Header(name.decode(errors="surrogateescape"), kind, _parse_octal(block[124:136]))
    except ValueError:  # a number in base 256, or damage
        pass
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise FileError("what follows is no header") from None
    return _Header(info.name, info.type, info.size)


def _parse_octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0] or b"0", 8)


def _read_extension(reader: _Reader, size: int) -> bytes:
    if size > _MAX_HEADER_BYTES:
        raise FileError(f"an extended header has {size} bytes, more than {_MAX_HEADER_BYTES}")
    content = reader.read(size + -size % _BLOCK_BYTES)[:size]
    if len(content) < size:
        raise FileError("it is cut short")
    return content


def _skip_sparse_maps(reader: _Reader, block: bytes) -> None:
    """Pass over the blocks behind the header of a sparse file in GNU's old format."""
    has_more = block[482]
    while has_more:
        block = reader.read(_BLOCK_BYTES)
        if len(block) < _BLOCK_BYTES:
            raise FileError("it is cut short")
        has_more = block[504]


class _PaxValues(NamedTuple):
    name: str | None
    size: int | None
    is_sparse: bool


def _parse_pax(content: bytes) -> _PaxValues:
    """Parse an extended header of POSIX.1-2001: lines `LENGTH KEY=VALUE`. Raises `FileError`."""
    values: dict[bytes, bytes] = {}
    position = 0
    try:
        while position < len(content) and content[position]:
            space = content.index(b" ", position, position + 20)
            end = position + int(content[position:space])
            if not space < end <= len(content):
                raise ValueError
            key, _, value = content[space + 1 : end - 1].partition(b"=")
            values[key] = value
            position = end
        size = int(values[b"size"]) if b"size" in values else None
        if size is not None and size < 0:
            raise ValueError
    except ValueError:
        raise FileError("an extended header is damaged") from None
    name = values.get(b"GNU.sparse.name", values.get(b"path"))
    return _PaxValues(
        None if name is None else name.decode(errors="surrogateescape"),
        size,
        any(key.startswith(b"GNU.sparse.") for key in values),
    )
