"""The keys file: one line for each API key.

    # a comment
    phone-app:classify:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
    operator:classify,manage,metrics:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08:2027-06-30

The fields are the name, the scopes, the SHA-256 of the key in hexadecimal digits, and optionally the last day
on which the key works, in UTC. The file never contains a key. A message about the file names the line and
never quotes it, because somebody may have put a key into it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

from fovea.service.access.caller import Scope
from fovea.service.errors import FoveaError
from fovea.service.observability.metrics import ANONYMOUS, OTHER_CALLERS

MAX_FILE_BYTES: Final = 1 << 20
"""Maximum size of a keys file in bytes."""

MAX_KEYS: Final = 1000
"""Maximum number of keys in a file."""

MAX_KEY_LENGTH: Final = 512
"""Maximum length of a key in characters."""

VALID_KEY: Final = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_KEY_LENGTH)
"""Characters that a key may have: those of ASCII that can be seen, without the space."""

_VALID_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VALID_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_VALID_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

_RESERVED_NAMES: Final = frozenset({ANONYMOUS, OTHER_CALLERS})
"""Names with a meaning of their own as a label of metrics."""


class KeysFileError(FoveaError):
    """A keys file cannot be read, or a line of it is not valid."""


@dataclass(frozen=True)
class ApiKey:
    """One line of a keys file."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes
    """SHA-256 of the key: 32 bytes."""
    last_day: date | None = None
    """Last day on which the key works, in UTC; None if the key does not expire."""

    @property
    def expires_at(self) -> float:
        """End of the last day in seconds since 1970; infinite if the key does not expire."""
        if self.last_day is None:
            return float("inf")
        midnight = datetime(self.last_day.year, self.last_day.month, self.last_day.day, tzinfo=UTC)
        return midnight.timestamp() + timedelta(days=1).total_seconds()

    def to_line(self) -> str:
        """Return the line of the file, without its end."""
        scopes = ",".join(scope for scope in Scope if scope in self.scopes)
        fields = [self.name, scopes, self.digest.hex()]
        return ":".join(fields if self.last_day is None else [*fields, self.last_day.isoformat()])


def hash_key(key: bytes) -> bytes:
    """Return the digest of a key. A fast hash is enough, because nobody can guess a random key."""
    return hashlib.sha256(key).digest()


def check_name(name: str) -> str:
    """Return the name of a key if it can be one. Raises `KeysFileError`."""
    if not _VALID_NAME.fullmatch(name):
        raise KeysFileError(
            "a name has 1 to 64 letters, digits and . _ - with a letter or digit first, such as phone-app"
        )
    if name in _RESERVED_NAMES:
        raise KeysFileError(f"the name {name!r} has a meaning of its own in metrics; take another name")
    return name


def parse_scopes(text: str) -> frozenset[Scope]:
    """Return the scopes in a comma-separated list. Raises `KeysFileError`."""
    try:
        return frozenset(Scope(name) for name in text.split(","))
    except ValueError:
        raise KeysFileError(
            f"a scope is not known; give {', '.join(Scope)} or several of them with commas between"
        ) from None


def parse_last_day(text: str) -> date:
    """Return the date in a text like `2027-06-30`. Raises `KeysFileError`."""
    try:
        if not _VALID_DATE.fullmatch(text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise KeysFileError("the last day is not a date like 2027-06-30") from None


def read_keys_file(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises `KeysFileError`."""
    return parse_keys(read_content(path))


def read_content(path: Path) -> bytes:
    """Return the content of a keys file. Raises `KeysFileError`, also for what is no regular file."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise KeysFileError("it is not a regular file")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysFileError(error.strerror or "it cannot be read") from None
    if len(content) > MAX_FILE_BYTES:
        raise KeysFileError(f"it has more than {MAX_FILE_BYTES} bytes")
    return content


def parse_keys(content: bytes) -> tuple[ApiKey, ...]:
    """Return the keys in the content of a file.

    Raises `KeysFileError` if any line is not valid, so that a broken file never opens or closes anything.
    """
    if not content.strip():
        # A file that is written in place is empty for a moment. `fovea keys` leaves a comment.
        raise KeysFileError(
            "it is empty; add a key with `fovea keys add`, or write a comment to let nobody in"
        )
    lines = content.split(b"\n")
    if lines.pop():
        raise KeysFileError(f"line {len(lines) + 1} does not end with a line feed, so it may be incomplete")
    keys: dict[str, tuple[int, ApiKey]] = {}
    numbers_by_digest: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            key = _parse_line(line)
            if key is None:
                continue
            if key.name in keys:
                raise KeysFileError(f"its name is already on line {keys[key.name][0]}")
            if key.digest in numbers_by_digest:
                raise KeysFileError(f"its key is already on line {numbers_by_digest[key.digest]}")
        except KeysFileError as error:
            raise KeysFileError(f"line {number}: {error}") from None
        keys[key.name] = number, key
        numbers_by_digest[key.digest] = number
        if len(keys) > MAX_KEYS:
            raise KeysFileError(f"it has more than {MAX_KEYS} keys")
    return tuple(key for _, key in keys.values())


def _parse_line(line: bytes) -> ApiKey | None:
    """Return the key of a line, or None for a comment or an empty line. Raises `KeysFileError`."""
    try:
        text = line.decode("ascii").strip()
    except UnicodeDecodeError:
        if line.lstrip().startswith(b"#"):
            return None
        raise KeysFileError("it has characters that are not ASCII") from None
    if not text or text.startswith("#"):
        return None
    fields = text.split(":")
    if len(fields) not in (3, 4):
        raise KeysFileError(f"it has {len(fields)} fields; it must be name:scopes:sha256 or with :last-day")
    name, scopes, digest, *rest = fields
    if not _VALID_DIGEST.fullmatch(digest):
        raise KeysFileError(
            "the third field is not a SHA-256, which has 64 hexadecimal digits; a key itself must not be here"
        )
    last_day = parse_last_day(rest[0]) if rest else None
    return ApiKey(check_name(name), parse_scopes(scopes), bytes.fromhex(digest), last_day)


def render_keys(lines: Iterable[str]) -> bytes:
    """Return the content of a file with these lines."""
    return "".join(f"{line}\n" for line in lines).encode()


HEADER_LINES: Final[Sequence[str]] = (
    "# API keys of Fovea. Each line is name:scopes:sha256 or name:scopes:sha256:last-day.",
)
"""First lines of a file that `fovea keys` creates."""
