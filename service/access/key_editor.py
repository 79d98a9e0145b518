"""Changes to a keys file: the work of `fovea keys`."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Final

from fovea.service.access.caller import Scope
from fovea.service.access.keys_file import (
    HEADER_LINES,
    MAX_KEYS,
    ApiKey,
    KeysFileError,
    check_name,
    hash_key,
    parse_keys,
    read_content,
)
from fovea.service.atomic_files import replace_file

_KEY_PREFIX: Final = "fovea_"
"""First characters of every new key, by which scanners for secrets can find it."""

_KEY_BYTES: Final = 24
"""Number of random bytes in a new key: 192 bits."""


def create_key() -> str:
    """Return a new random key."""
    return _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def list_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises `KeysFileError`."""
    return parse_keys(_read(path))


def add_key(path: Path, name: str, scopes: frozenset[Scope], last_day: date | None = None) -> str:
    """Add a new key to a file, which is created if there is none, and return the key.

    Raises `KeysFileError`; the file is then unchanged.
    """
    check_name(name)
    with _lock_folder(path):
        content = _read(path) if path.exists() else "".join(f"{one}\n" for one in HEADER_LINES).encode()
        keys = parse_keys(content)
        if any(key.name == name for key in keys):
            raise KeysFileError(
                f"{path}: there is a key {name!r} already; add the new key under another name, and remove "
                f"{name!r} when no caller uses it any more"
            )
        if len(keys) >= MAX_KEYS:
            raise KeysFileError(f"{path}: it has {len(keys)} keys already, which is the limit")
        new_key = create_key()
        line = ApiKey(name, scopes, hash_key(new_key.encode()), last_day).to_line()
        _write(path, content + f"{line}\n".encode())
    return new_key


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file. Comments and the other keys stay.

    Raises `KeysFileError`; the file is then unchanged.
    """
    with _lock_folder(path):
        content = _read(path)
        if all(key.name != name for key in parse_keys(content)):
            raise KeysFileError(f"{path}: there is no key {name!r}; `fovea keys list` shows the names")
        # The file is valid, so the name stands before the first colon of its only line.
        lines = content.splitlines(keepends=True)
        kept_lines = [line for line in lines if line.partition(b":")[0].strip() != name.encode()]
        # Without keys and comments the file would be empty, and a service would keep the old keys.
        header = [f"{one}\n".encode() for one in HEADER_LINES]
        _write(path, b"".join(kept_lines if b"".join(kept_lines).strip() else header))


def _read(path: Path) -> bytes:
    try:
        return read_content(path)
    except KeysFileError as error:
        raise KeysFileError(f"{path}: {error}") from None


def _write(path: Path, content: bytes) -> None:
    """Replace the file, so that no reader sees a part of it. The file keeps its owner and permissions."""
    target = path.resolve()  # a link stays a link
    try:
        parse_keys(content)
        with replace_file(target) as partial, partial.open("wb") as file:
            # The permissions come first: nobody may read the new file who cannot read the old one.
            if target.exists():
                status = target.stat()
                with suppress(PermissionError):  # only root can give a file to another user
                    os.chown(partial, status.st_uid, status.st_gid)
                shutil.copymode(target, partial)
            file.write(content)
            file.flush()  # before the file is written to the disk and gets its name
    except OSError as error:
        raise KeysFileError(f"{path}: it cannot be written: {error.strerror}") from None


@contextmanager
def _lock_folder(path: Path) -> Iterator[None]:
    """Let only one process at a time change the files of a folder. Raises `KeysFileError`."""
    try:
        descriptor = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KeysFileError(f"{path}: its folder cannot be opened: {error.strerror}") from None
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
