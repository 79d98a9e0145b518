"""Images in ZIP archives, in place and in bounded memory.

`zipfile` keeps the whole directory of an archive in memory, about 1 kB for each member, and reads it again at
each opening. Here the directory is read as a stream, and an entry holds what it needs to read its member.
The format is described in PKWARE's APPNOTE.TXT, whose sections are named below.
"""

from __future__ import annotations

import bz2
import lzma
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from fovea.bulk.inputs.basic_entries import (
    FailedEntry,
    SpecialEntry,
    clean_member_name,
    describe_error,
    is_hidden_member,
)
from fovea.bulk.inputs.source_files import OpenFile, SourceFile, WindowReader
from fovea.service.errors import FileError
from fovea.service.image_files import ImageEntry, check_image_size

_END: Final = struct.Struct("<4s4H2LH")  # 4.3.16
_END_SIGNATURE: Final = b"PK\5\6"
_END64: Final = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_END64_SIGNATURE: Final = b"PK\6\6"
_LOCATOR64: Final = struct.Struct("<4sLQL")  # 4.3.15
_LOCATOR64_SIGNATURE: Final = b"PK\6\7"
_MEMBER: Final = struct.Struct("<4s6H3L5H2L")  # 4.3.12
_MEMBER_SIGNATURE: Final = b"PK\1\2"
_LOCAL: Final = struct.Struct("<4s5H3L2H")  # 4.3.7
_LOCAL_SIGNATURE: Final = b"PK\3\4"

_MAX_COMMENT_BYTES: Final = 0xFFFF

_ENCRYPTED_FLAGS: Final = 0x1 | 0x40 | 0x2000
"""Flags of encryption, strong encryption, and a hidden directory (4.4.4)."""

_UTF8_FLAG: Final = 0x800

_SIZE_IN_EXTRA: Final = 0xFFFFFFFF
"""A number that stands in the extra field of ZIP64 (4.5.3)."""

_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14

_CHUNK_BYTES: Final = 1 << 20
"""Compressed bytes that are read at once."""

_HEADER_GUESS_BYTES: Final = 1024
"""Bytes that are read for a member's own header, so that most small members take one read."""

_UNIX: Final = 3

_LZMA_HEADER: Final = struct.Struct("<2xHBL")  # 5.8.8
_LZMA_MIN_DICTIONARY: Final = 4096


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A file in a ZIP archive."""

    archive: SourceFile
    member: str
    """Path in the archive."""
    offset: int
    """Where the member's own header begins in the archive."""
    compressed_size: int
    size: int
    """Size in bytes that the directory states."""
    method: int
    """Number of the compression method."""
    checksum: int
    """CRC-32 of the content."""
    is_encrypted: bool = False
    is_named: bool = False

    @property
    def name(self) -> str:
        """Path of the archive and of the member."""
        return f"{self.archive.name}/{self.member}"

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError`, and `BodyTooLarge` before anything is read.

        No more bytes are unpacked than the directory states, whatever the compressed data is.
        """
        if self.is_encrypted:
            raise FileError("the file is encrypted in the archive; unpack the archive with its password")
        check_image_size(self.size, max_bytes, "the file")
        decompressor = _create_decompressor(self.method)
        content = bytearray()
        with self.archive.open() as archive:
            window_bytes = min(self.compressed_size + _HEADER_GUESS_BYTES, _CHUNK_BYTES)
            reader = WindowReader(archive, self.offset, window_bytes)
            _skip_header(reader)
            left = self.compressed_size
            while left and not decompressor.is_done and len(content) <= self.size:
                chunk = reader.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise FileError("the file is damaged in the archive: it is cut short")
                left -= len(chunk)
                try:
                    content += decompressor.decompress(chunk, self.size + 1 - len(content))
                except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                    raise FileError(f"the file is damaged in the archive: {describe_error(error)}") from None
        if len(content) != self.size:
            more = "more" if len(content) > self.size else "fewer"
            raise FileError(f"the file is damaged in the archive: it has {more} than {self.size} bytes")
        if zlib.crc32(content) != self.checksum:
            raise FileError("the file is damaged in the archive: its checksum is another")
        return bytes(content)


def _skip_header(reader: WindowReader) -> None:
    """Move a reader behind a member's own header, whose length the directory does not state."""
    header = reader.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(_LOCAL_SIGNATURE):
        raise FileError("the file is damaged in the archive: there is no header at its place")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    reader.offset += name_length + extra_length


def list_zip_members(archive: SourceFile) -> Iterator[ImageEntry]:
    """Yield the files of a ZIP archive in the order of its directory.

    Members of one name are all yielded. Damage of the directory becomes one entry with the error, behind the
    files that could be read.
    """
    try:
        with archive.open() as file:
            directory = _find_directory(file)
            number = 0
            for member in _read_directory(file, directory):
                number += 1
                entry = _create_entry(archive, member)
                if entry is not None:
                    yield entry
            if number & 0xFFFF != directory.member_count & 0xFFFF:
                raise FileError(f"its directory names {directory.member_count} files, but lists {number}")
    except FileError as error:
        yield FailedEntry(
            archive.name, f"the ZIP archive is damaged or incomplete: {error}; repair it with `zip -FF`"
        )


def count_zip_members(archive: SourceFile) -> int | None:
    """Return the number of members that the end of an archive states, or None if the archive is damaged."""
    try:
        with archive.open() as file:
            return _find_directory(file).member_count
    except FileError:
        return None


class _Directory(NamedTuple):
    offset: int
    size: int
    member_count: int
    prefix: int
    """Bytes before the archive, such as a program that unpacks it; offsets do not count them."""


def _find_directory(file: OpenFile) -> _Directory:
    """Return where the directory is. Raises `FileError`."""
    tail_start = max(0, file.size - _END.size - _MAX_COMMENT_BYTES - _LOCATOR64.size - _END64.size)
    tail = file.read_at(tail_start, file.size - tail_start)
    place = tail.rfind(_END_SIGNATURE)
    while place >= 0:  # the signature may stand in a comment
        record = tail[place : place + _END.size]
        if len(record) == _END.size and place + _END.size + _END.unpack(record)[-1] <= len(tail):
            break
        place = tail.rfind(_END_SIGNATURE, 0, place)
    if place < 0:
        raise FileError("it has no directory at its end")
    _, disk, directory_disk, _, count, size, offset, _ = _END.unpack(record)
    end = tail_start + place
    locator = tail[max(0, place - _LOCATOR64.size) : place]
    if len(locator) == _LOCATOR64.size and locator.startswith(_LOCATOR64_SIGNATURE):
        # Where a prefix was put before the archive, the stated offset is too small.
        stated = _LOCATOR64.unpack(locator)[2]
        for start in (stated, end - _LOCATOR64.size - _END64.size):
            record = file.read_at(start, _END64.size)
            if len(record) == _END64.size and record.startswith(_END64_SIGNATURE):
                _, _, _, _, disk, directory_disk, _, count, size, offset = _END64.unpack(record)
                end = start
                break
        else:
            raise FileError("its directory is damaged")
    if disk or directory_disk:
        raise FileError("it is one of several volumes")
    prefix = end - size - offset
    if prefix < 0:
        raise FileError("its directory is damaged")
    return _Directory(offset + prefix, size, count, prefix)


class _Member(NamedTuple):
    name: bytes
    flags: int
    method: int
    checksum: int
    compressed_size: int
    size: int
    mode: int
    """Mode of Unix, or 0."""
    offset: int


def _read_directory(file: OpenFile, directory: _Directory) -> Iterator[_Member]:
    """Yield the members of a directory, as a stream. Raises `FileError`."""
    reader = WindowReader(file, directory.offset)
    end = directory.offset + directory.size
    while reader.offset < end:
        header = reader.read(_MEMBER.size)
        if len(header) < _MEMBER.size or not header.startswith(_MEMBER_SIGNATURE):
            raise FileError("its directory is damaged")
        (
            _,
            made_by,
            _,
            flags,
            method,
            _,
            _,
            checksum,
            compressed_size,
            size,
            name_length,
            extra_length,
            comment_length,
            _,
            _,
            attributes,
            offset,
        ) = _MEMBER.unpack(header)
        variable = reader.read(name_length + extra_length + comment_length)
        if len(variable) < name_length + extra_length + comment_length or reader.offset > end:
            raise FileError("its directory is damaged")
        extra = variable[name_length : name_length + extra_length]
        size, compressed_size, offset = _read_large_numbers(extra, size, compressed_size, offset)
        mode = attributes >> 16 if made_by >> 8 == _UNIX else 0
        yield _Member(
            variable[:name_length],
            flags,
            method,
            checksum,
            compressed_size,
            size,
            mode,
            offset + directory.prefix,
        )


def _read_large_numbers(extra: bytes, *numbers: int) -> tuple[int, ...]:
    """Return the numbers with those above 4 GiB from the extra field (4.5.3). Raises `FileError`."""
    if _SIZE_IN_EXTRA not in numbers:
        return numbers
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            try:
                return tuple(next(values) if one == _SIZE_IN_EXTRA else one for one in numbers)
            except (StopIteration, RuntimeError):
                break
        extra = extra[4 + length :]
    raise FileError("its directory is damaged")


def _create_entry(archive: SourceFile, member: _Member) -> ImageEntry | None:
    raw_name = _decode_name(member)
    if raw_name.endswith("/"):
        return None
    name = clean_member_name(raw_name)
    if name is None:
        shown = clean_member_name(raw_name.replace("..", "__")) or "member"
        return FailedEntry(
            f"{archive.name}/{shown}", "the file's name leads out of the archive or is empty", is_named=False
        )
    if is_hidden_member(name):
        return None
    if stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
        return SpecialEntry(f"{archive.name}/{name}", "a link or a device in an archive is not read")
    return ZipMember(
        archive,
        name,
        member.offset,
        member.compressed_size,
        member.size,
        member.method,
        member.checksum,
        bool(member.flags & _ENCRYPTED_FLAGS),
    )


def _decode_name(member: _Member) -> str:
    """Return a member's name; some programs, such as macOS's Finder, write UTF-8 without the flag."""
    try:
        name = member.name.decode()
    except UnicodeDecodeError:
        name = (
            member.name.decode(errors="surrogateescape")
            if member.flags & _UTF8_FLAG
            else member.name.decode("cp437")
        )
    return name.replace("\\", "/")  # of programs of Windows, against 4.4.17


class _Decompressor:
    """One interface to the decompressors of Python, none of which gives more than it is asked for."""

    def __init__(self, method: int) -> None:
        self._method = method
        self._inner: Any = None
        self._head = b""
        self.is_done = False
        if method == _DEFLATED:
            self._inner = zlib.decompressobj(-zlib.MAX_WBITS)
        elif method == _BZIP2:
            self._inner = bz2.BZ2Decompressor()

    def decompress(self, chunk: bytes, max_bytes: int) -> bytes:
        """Return what a chunk gives, at most `max_bytes` bytes in all; more is never asked for."""
        if self._method == _STORED:
            return chunk[:max_bytes]
        if self._inner is None:
            self._head += chunk
            if len(self._head) < _LZMA_HEADER.size:
                return b""
            chunk = self._head[_LZMA_HEADER.size :]
            self._inner = _create_lzma(self._head, max_bytes)
        content = bytes(self._inner.decompress(chunk, max_bytes))
        # A chunk that has more to give than `max_bytes` ends the reading: the caller has one byte too many.
        self.is_done = bool(self._inner.eof)
        return content


def _create_decompressor(method: int) -> _Decompressor:
    if method not in (_STORED, _DEFLATED, _BZIP2, _LZMA):
        raise FileError(
            f"the file has the compression method {method} in the archive, which is not supported; unpack "
            "the archive"
        )
    return _Decompressor(method)


def _create_lzma(head: bytes, max_bytes: int) -> lzma.LZMADecompressor:
    length, properties, dictionary = _LZMA_HEADER.unpack_from(head)
    if length != 5 or properties >= 9 * 5 * 5:
        raise ValueError("its LZMA header is damaged")
    parts, lc = divmod(properties, 9)
    pb, lp = divmod(parts, 5)
    # No content refers back further than its own start, whatever the header asks memory for.
    size = max(_LZMA_MIN_DICTIONARY, min(dictionary, max_bytes))
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": lc, "lp": lp, "pb": pb}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
