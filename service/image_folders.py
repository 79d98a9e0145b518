"""Walks through folders of images, in the order of names and in bounded memory."""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Final

_SYSTEM_NAMES: Final = frozenset(
    {
        "__macosx",
        "icon\r",
        "network trash folder",
        "temporary items",  # macOS
        "thumbs.db",
        "thumbs.db:encryptable",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "folder.ini",
        "picasa.ini",
        "$recycle.bin",
        "recycler",
        "recycled",
        "system volume information",
        "found.000",  # Windows
        "lost+found",  # ext4
        "@eadir",
        "@tmp",
        "@sharebin",
        "#recycle",
        "#snapshot",
        "#synctrash",  # Synology
        "@recycle",
        "@recently-snapshot",
        "@__thumb",
        "@upload_cache",  # QNAP
        "__pycache__",
    }
)
"""Names of files and folders that systems create for themselves, in lower case."""

_RUN_NAMES: Final = 100_000
"""Number of names of one folder that are sorted in memory, about 12 MB; more are merged from a file."""

_RUN_BLOCK_BYTES: Final = 64 << 10
"""Bytes that are read at once from each sorted run of names."""

_FOLDER_MARK: Final = "\0d"
_FILE_MARK: Final = "\0f"
"""Ends of records. No name has a null byte, which sorts before every other character."""

_RECORD_END: Final = b"/"
"""No name has a slash; a name may have a line break."""


def is_clutter(name: str) -> bool:
    """Return True for the name of a hidden file or folder, or of one that a system creates for itself."""
    return name.lower() in _SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))


def walk_folder(folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder, without clutter.

    Files and folders come in the order of their names. Links to folders are not followed. A folder that
    cannot be listed is yielded itself. Memory is bounded, also for millions of files in one folder.
    """
    top = open_folder(folder)
    if top is None:
        yield folder
        return
    # A list instead of recursion: folders may be nested more deeply than Python's calls.
    waiting = [(folder, top)]
    try:
        while waiting:
            parent, listing = waiting[-1]
            entry = next(listing, None)
            if entry is None:
                listing.close()
                waiting.pop()
                continue
            name, is_folder = entry
            path = join_path(parent, name)
            if is_folder and (children := open_folder(path)) is not None:
                waiting.append((path, children))
            else:
                yield path
    finally:
        for _, listing in waiting:
            listing.close()


def join_path(folder: str, name: str) -> str:
    """Return the path of a name in a folder; names in the current folder stay short."""
    return name if folder in (".", "") else os.path.join(folder, name)  # noqa: PTH118 - a million times


def open_folder(folder: str) -> FolderListing | None:
    """Return the listing of a folder, which the caller closes; None if the folder cannot be listed."""
    try:
        return FolderListing(folder)
    except OSError:
        return None


def _ask(question: Callable[[], bool]) -> bool:
    """Return the answer about an entry of a folder, or False if the system fails to give one.

    A link to itself, or into a folder without permission, has no answer. The entry then counts as a file,
    whose reading has the error, and the other entries of the folder are listed.
    """
    try:
        return question()
    except OSError:
        return False


class FolderListing:
    """The names in a folder, sorted, each with a flag for folders; without clutter and links to folders."""

    def __init__(self, folder: str) -> None:
        """List the folder. Raises `OSError`."""
        self._file: IO[bytes] | None = None
        records: list[str] = []
        runs: list[tuple[int, int]] = []
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    if is_clutter(entry.name):
                        continue
                    if _ask(partial(entry.is_dir, follow_symlinks=False)):
                        records.append(entry.name + _FOLDER_MARK)
                    elif not (_ask(entry.is_symlink) and _ask(entry.is_dir)):
                        records.append(entry.name + _FILE_MARK)
                    if len(records) == _RUN_NAMES:
                        runs.append(self._write_run(records))
                        records = []
        except BaseException:
            self.close()
            raise
        records.sort()
        iterators = [iter(records), *(self._read_run(*run) for run in runs)]
        self._records = iterators[0] if not runs else heapq.merge(*iterators)

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """Return the listing, which can be read once."""
        return self

    def __next__(self) -> tuple[str, bool]:
        """Return the next name, and whether it is a folder's."""
        record = next(self._records)
        return record[:-2], record.endswith(_FOLDER_MARK)

    def close(self) -> None:
        """Remove the file of sorted runs, if there is one."""
        if self._file is not None:
            self._file.close()

    def _write_run(self, records: list[str]) -> tuple[int, int]:
        """Append a sorted run of records to the file; return where it begins and ends."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - `close` removes it
        start = self._file.tell()
        records.sort()
        for record in records:
            self._file.write(os.fsencode(record) + _RECORD_END)
        self._file.flush()
        return start, self._file.tell()

    def _read_run(self, start: int, end: int) -> Iterator[str]:
        file = self._file
        rest = b""
        while file is not None and start < end:
            block = os.pread(file.fileno(), min(_RUN_BLOCK_BYTES, end - start), start)
            if not block:
                raise OSError("the temporary file of names is cut short")
            start += len(block)
            *complete, rest = (rest + block).split(_RECORD_END)
            yield from map(os.fsdecode, complete)
