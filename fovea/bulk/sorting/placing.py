"""Copying and moving of single files: complete or absent, and never over another file.

A copy is written to a hidden file beside its target, and then gets its name by a hard link, which fails if
the name is taken. A move within a file system is a hard link too, after which the old name is removed. A move
to another file system copies, and keeps the hidden file until the old one is removed. After a kill, the
hidden file and the target are then the same file, which proves that this image was moved and not one like it.

File systems without hard links get a rename after a look whether the name is free.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Final

_NO_LINKS: Final = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
)
"""Errors of a hard link on file systems that have none, or no more for this file."""

_COMPARED_BYTES: Final = 1 << 20
"""Number of bytes that are compared at once."""


def copy_file(source: str, target: Path, *, digest: str) -> bool:
    """Copy a file with its times and permissions. Return False if the target exists; raises `OSError`.

    `digest` names the hidden file, and is the same for this image in each run.
    """
    if os.path.lexists(target):
        return False
    partial = _find_partial(target, digest)
    try:
        _write_copy(source, partial)
        return _give_name(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_image(content: bytes, target: Path, *, digest: str) -> bool:
    """Write an image that is in memory. Return False if the target exists; raises `OSError`."""
    if os.path.lexists(target):
        return False
    partial = _find_partial(target, digest)
    try:
        partial.unlink(missing_ok=True)  # of a killed run: it may be a link to a finished file
        partial.write_bytes(content)
        return _give_name(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def move_file(source: str, target: Path, *, digest: str) -> bool:
    """Move a file. Return False if the target exists and is another file; raises `OSError`.

    Also completes a move that was killed.
    """
    if _complete_move(source, target, digest):
        return True
    if os.path.lexists(target):
        return False
    remove_partial(target, digest)  # of a killed run that had not named it
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.EXDEV:
            return _move_across(source, target, digest)
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            return False
        os.rename(source, target)  # noqa: PTH104 - a name that is not UTF-8
        return True
    _remove_source(source, target)
    return True


def remove_partial(target: Path, digest: str) -> None:
    """Remove the hidden file of an image that was moved by a run that was killed. Raises `OSError`."""
    _find_partial(target, digest).unlink(missing_ok=True)


def is_same_entry(source: str, target: Path) -> bool:
    """Return whether both paths name the same entry of the same folder, and not only the same content.

    A file system that ignores case, or a folder with two paths, gives an entry two names. Two hard links are
    two entries.
    """
    folder, name = os.path.split(source)
    return (
        _ignore_case(name) == _ignore_case(target.name)
        and _is_same_file(os.path.realpath(folder or "."), target.parent.resolve())
        and _is_same_file(source, target)
    )


def has_same_content(source: str, target: Path) -> bool:
    """Return whether two files have the same bytes. Raises `OSError`."""
    target_status = target.stat()
    # A pipe of the target's name has no size; opening it would wait for ever.
    if not stat.S_ISREG(target_status.st_mode) or target_status.st_size != os.stat(source).st_size:  # noqa: PTH116
        return False
    with open(source, "rb") as one, target.open("rb") as other:  # noqa: PTH123 - a name that is not UTF-8
        while block := one.read(_COMPARED_BYTES):
            if block != other.read(_COMPARED_BYTES):
                return False
        return not other.read(1)


def has_content(target: Path, content: bytes) -> bool:
    """Return whether a file has these bytes. Raises `OSError`."""
    status = target.stat()
    is_alike = stat.S_ISREG(status.st_mode) and status.st_size == len(content)
    return is_alike and target.read_bytes() == content


def compute_digest(path: str) -> str:
    """Return a digest of an image's path, which names its hidden file."""
    return hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:24]


def _find_partial(target: Path, digest: str) -> Path:
    """Return the hidden file of an image, which a later run writes anew."""
    return target.with_name(f".{digest}.fovea-tmp")


def _write_copy(source: str, partial: Path) -> None:
    partial.unlink(missing_ok=True)  # of a killed run: it may be a link to a finished file
    shutil.copyfile(source, partial)
    with suppress(OSError):  # a drive without permissions
        shutil.copystat(source, partial)


def _give_name(partial: Path, target: Path) -> bool:
    """Give the hidden file its name as well. Return False if the name is taken."""
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            return False
        partial.rename(target)
    return True


def _move_across(source: str, target: Path, digest: str) -> bool:
    """Move a file to another file system. The copy is on the disk before the old file is removed."""
    partial = _find_partial(target, digest)
    try:
        _write_copy(source, partial)
        _sync(partial)
        is_named = _give_name(partial, target)
        if is_named:
            _sync(target.parent)
            _remove_source(source, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.unlink(missing_ok=True)
    return is_named


def _complete_move(source: str, target: Path, digest: str) -> bool:
    """Remove the old name of a file that already has its new one. Return False if it does not."""
    if _is_same_file(source, target):
        # Two hard links, as `is_same_entry` was asked before. The count guards the only name of a file.
        if os.lstat(source).st_nlink > 1:
            _remove_source(source, target)
        return True
    if not _is_same_file(_find_partial(target, digest), target):
        return False
    is_moved = has_same_content(source, target)  # otherwise the source is another image now
    if is_moved:
        _remove_source(source, target)
    remove_partial(target, digest)
    return is_moved


def _remove_source(source: str, target: Path) -> None:
    """Remove the old name; if that is not allowed, remove the new one and raise `OSError`."""
    try:
        os.unlink(source)  # noqa: PTH108 - a name that is not UTF-8
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _is_same_file(one: str | Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ignore_case(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
