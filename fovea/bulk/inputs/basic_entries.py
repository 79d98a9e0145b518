"""Entries of files, of images that are in memory already, and of what cannot be read."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from fovea.service.errors import BodyTooLarge, FileError, UnsupportedFormat, to_one_line
from fovea.service.image_files import ImageEntry, check_image_size, read_image_file
from fovea.service.image_folders import is_clutter

MAX_IMAGE_BYTES: Final = 64 << 20
"""Default of the largest image in bytes, as that of `FOVEA_BODY_BYTES`."""

_AMBIGUOUS_BACKSLASH: Final = r"\\(?=x[0-9a-f]{2}|ud[89a-f][0-9a-f]{2})"
"""A backslash that would read as the start of an escape."""

_ESCAPED_IN_PATHS: Final = re.compile(f"[\ud800-\udfff]|{_AMBIGUOUS_BACKSLASH}")

_ESCAPED_IN_MEMBERS: Final = re.compile(f"[\0-\x1f\x7f\ud800-\udfff]|{_AMBIGUOUS_BACKSLASH}")

_ESCAPES: Final = re.compile(r"\\x([0-9a-f]{2})|\\u(d[89a-f][0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of this machine."""

    path: str
    """Path as the system knows it; a name that is not UTF-8 is decoded by `os.fsdecode`."""
    is_named: bool = False
    may_wait: bool = False
    """Whether the file may be a pipe or a device, whose writer lets the reader wait."""

    @property
    def name(self) -> str:
        """The path as text."""
        return to_text(self.path)

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError`, `BodyTooLarge`, and `UnsupportedFormat` for a device."""
        return read_image_file(self.path, max_bytes, only_regular=not self.may_wait)


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """An image that was read with its source, such as a compressed archive."""

    name: str
    content: bytes = field(repr=False)
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `BodyTooLarge`."""
        check_image_size(len(self.content), max_bytes, "the file")
        return self.content


@dataclass(frozen=True, slots=True)
class FailedEntry:
    """An image, or the rest of a source, that cannot be read."""

    name: str
    message: str
    is_named: bool = True

    def read(self, max_bytes: int) -> bytes:
        """Raise `FileError`."""
        raise FileError(self.message)


@dataclass(frozen=True, slots=True)
class SpecialEntry:
    """A link or a device in an archive. Like a file that is no image, it may be skipped."""

    name: str
    message: str
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Raise `UnsupportedFormat`."""
        raise UnsupportedFormat(self.message)


@dataclass(frozen=True, slots=True)
class LargeEntry:
    """A file of a stream that is larger than the largest image, and was passed over."""

    name: str
    limit: int
    """Largest number of bytes, which the file exceeds."""
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Raise `BodyTooLarge`."""
        raise BodyTooLarge(f"the file has more than {min(max_bytes, self.limit)} bytes (FOVEA_BODY_BYTES)")


def count_held_bytes(entry: ImageEntry) -> int:
    """Return the number of bytes of the encoded image that an entry holds in memory."""
    return len(entry.content) if isinstance(entry, BytesEntry) else 0


def to_text(path: str) -> str:
    r"""Return a path as text in valid UTF-8, such that two paths stay different.

    A byte that is not UTF-8 becomes `\xe9`. A backslash in front of `xe9` becomes `\x5c`, so that a file with
    these four characters in its name keeps a name of its own. `to_path` is the reverse.
    """
    return path if path.isascii() and "\\" not in path else _ESCAPED_IN_PATHS.sub(_escape, path)


def to_path(text: str) -> str:
    """Return the path whose text this is."""
    return _ESCAPES.sub(_unescape, text) if "\\" in text else text


def describe_error(error: Exception) -> str:
    """Return what an error of the system or of a library says, in one line."""
    if isinstance(error, OSError) and not isinstance(error, FileError) and error.strerror:
        return error.strerror
    return to_one_line(error) or type(error).__name__


def clean_member_name(name: str) -> str | None:
    r"""Return the path of a member in its archive, without `.`, `//` and a leading `/`.

    Control characters and bytes that are not UTF-8 become `\x00`, as in `to_text`. Returns None if the name
    leads out of the archive, or names nothing.
    """
    name = posixpath.normpath(name.lstrip("/"))
    if name in (".", "..") or name.startswith("../"):
        return None
    return _ESCAPED_IN_MEMBERS.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as `os.fsdecode` has it
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # half a character of UTF-16


def _unescape(match: re.Match[str]) -> str:
    byte, half = match.groups()
    if half is not None:
        return chr(int(half, 16))
    code = int(byte, 16)
    return chr(code if code < 0x80 else 0xDC00 + code)


def is_hidden_member(name: str) -> bool:
    """Return True if a file in an archive, or a folder that holds it, is hidden or a system's own."""
    folder, _, file = name.rpartition("/")
    return is_clutter(file) or (folder != "" and _is_hidden_folder(folder))


@lru_cache(maxsize=1024)
def _is_hidden_folder(folder: str) -> bool:
    return any(map(is_clutter, folder.split("/")))
