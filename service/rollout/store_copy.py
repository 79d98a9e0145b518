"""A local copy of a repository in an object store.

A file of the copy is replaced as a whole, so a version appears when it is complete, and a kill, a full disk
or a lost connection leaves what was there before. A new version and a new `config.toml` of the same model
appear together. Files that are gone from the store are removed, unless the
store is empty. Only names of a repository's layout are copied. An index lists the copied files, and no other
file of the folder is touched. All of this blocks; it runs in a process of its own (`store_copy_process`).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from fovea.service.atomic_files import (
    StagedFile,
    WriteError,
    remove_abandoned_files,
    stage_file,
    write_file,
)
from fovea.service.errors import to_one_line
from fovea.service.remote.store import Store, StoredFile
from fovea.service.remote.store_uri import StoreError, StoreFileNotFound, require_private

_INDEX_FILE: Final = ".fovea-store.json"

_LOCK_FILE: Final = ".fovea-store.lock"

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

_LAYOUT: Final = re.compile(rf"(?:(?:{_NAME}/)?[0-9]{{1,18}}/)?model\.onnx|(?:{_NAME}/)?config\.toml|default")
"""Paths that a repository has, in any of its layouts."""

_VERDICT_FILE: Final = "trial.json"
"""File that the service writes beside a model file; it goes with the version."""


class _Index(NamedTuple):
    """The recorded state of a copy."""

    uri: str
    files: dict[str, list[Any]]
    """The store's marker, the size and the local time of change of each copied file."""
    updated: float
    """Time of the last complete update, in seconds since 1970."""


def read_index(folder: Path) -> _Index:
    """Return the index of a copy. If it is missing or broken, everything will be copied again."""
    try:
        index = json.loads((folder / _INDEX_FILE).read_bytes())
        files = {path: value for path, value in index["files"].items() if _LAYOUT.fullmatch(path)}
        return _Index(str(index["uri"]), files, float(index["updated"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return _Index("", {}, 0.0)


def has_complete_copy(uri: str, folder: Path) -> bool:
    """Return True if the folder had all files of the store once."""
    index = read_index(folder)
    return index.uri == uri and index.updated > 0


class CopyReport(NamedTuple):
    """The result of one update."""

    copied: list[str]
    """Paths that are new or have changed."""
    removed: list[str]
    total: int
    """Number of files in the copy."""


class StoreCopy:
    """The copy of one store in one folder."""

    def __init__(self, store: Store, folder: Path) -> None:
        """Copy `store` to `folder`, which only this user may write to."""
        self._store = store
        self._folder = folder

    def update(self) -> CopyReport:
        """Bring the copy up to date. Raises `StoreError`; the copy is then as good as before.

        Other processes that update the same folder wait for each other.
        """
        try:
            create_private_folder(self._folder)
            with self._lock():
                return self._update()
        except WriteError as error:
            raise StoreError(str(error)) from None
        except OSError as error:
            path = error.filename or self._folder
            raise StoreError(f"cannot write {path}: {error.strerror or to_one_line(error)}") from None

    def _update(self) -> CopyReport:
        stored = [one for one in self._store.list_files() if _LAYOUT.fullmatch(one.path)]
        if not any(one.path.endswith("model.onnx") for one in stored):
            raise StoreError(
                f"{self._store.uri} has no <name>/<version>/model.onnx, <version>/model.onnx or model.onnx; "
                "the copy stays as it is"
            )
        for partial in remove_abandoned_files(self._folder):
            self._remove_empty_folders(partial)
        index = self._read_index()
        copied: list[str] = []
        errors: list[StoreError] = []
        # Model files first: a configuration may ask for a version that is new too.
        stored.sort(key=lambda one: (not one.path.endswith("model.onnx"), one.path))
        changed = [one for one in stored if index.files.get(one.path) != self._describe(one)]
        for files in _group_files(changed, is_complete=index.updated > 0):
            for one in self._copy_files(files, errors):
                index.files[one.path] = self._describe(one)
                copied.append(one.path)
            self._write_index(index)
        gone = sorted(index.files.keys() - {one.path for one in stored})
        for path in gone:
            self._require_gone(path)
            self._remove_file(path)
            del index.files[path]
            self._write_index(index)
        if errors:  # an unreadable file does not keep others from being rolled back
            raise errors[0]
        self._write_index(index._replace(updated=time.time()))
        return CopyReport(copied, gone, len(stored))

    def _copy_files(self, files: Sequence[StoredFile], errors: list[StoreError]) -> list[StoredFile]:
        """Copy files that belong together, and let them appear together. Return those that did.

        The error of a file is added to `errors`; the other files are not to blame.
        """
        ready: list[tuple[StoredFile, StagedFile]] = []
        with ExitStack() as stack:
            for one in files:
                target = self._folder / one.path
                stack.callback(self._remove_empty_folders, target)
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = stack.enter_context(stage_file(target))
                try:
                    with staged.partial.open("wb") as file:
                        self._store.copy_file(one, file)
                except StoreError as error:
                    errors.append(error)
                    if one.path.endswith("config.toml"):  # a version must not be tried without it
                        return []
                    continue
                ready.append((one, staged))
            for _, staged in ready:
                staged.flush()  # which may take long: nothing waits between two names
            for _, staged in ready:
                staged.publish()
        return [one for one, _ in ready]

    def _require_gone(self, path: str) -> None:
        """Raise `StoreError` if a file that was not listed is still there: the listing has a gap."""
        try:
            self._store.describe_file(path)
        except StoreFileNotFound:
            return
        raise StoreError(f"{self._store.uri} did not list {path}, which is there; nothing is removed")

    def _remove_file(self, path: str) -> None:
        """Remove a file, and the folders that are empty without it."""
        target = self._folder / path
        target.unlink(missing_ok=True)
        if target.name == "model.onnx" and target.parent != self._folder:
            (target.parent / _VERDICT_FILE).unlink(missing_ok=True)
        self._remove_empty_folders(target)

    def _remove_empty_folders(self, target: Path) -> None:
        for folder in target.parents:
            if folder == self._folder:
                break
            with suppress(OSError):  # other files are in it
                folder.rmdir()

    def _describe(self, stored: StoredFile) -> list[Any]:
        """Return what the index holds of a file: the store's marker, and the local file's identity."""
        try:
            status = (self._folder / stored.path).stat()
        except OSError:
            return []
        if status.st_size != stored.size:
            return []
        return [stored.marker, stored.size, status.st_mtime_ns]

    def _read_index(self) -> _Index:
        index = read_index(self._folder)
        return index if index.uri == self._store.uri else _Index(self._store.uri, {}, 0.0)

    def _write_index(self, index: _Index) -> None:
        write_file(self._folder / _INDEX_FILE, json.dumps(index._asdict()))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _group_files(files: Sequence[StoredFile], is_complete: bool) -> Iterator[list[StoredFile]]:
    """Yield the changed files that must appear together: a `config.toml` with its model's versions.

    All others are alone. Nobody watches a copy that was never complete, and files that are copied one by
    one are not copied again after a kill.
    """
    configs = {one.path: one for one in files if is_complete and one.path.endswith("config.toml")}
    groups: dict[str, list[StoredFile]] = {path: [one] for path, one in configs.items()}
    for one in files:
        if one.path in configs:
            continue
        names = one.path.split("/")
        config = "/".join([*names[:-2], "config.toml"])
        if config in groups and names[-1] == "model.onnx":
            groups[config].append(one)
        else:
            groups[one.path] = [one]
    yield from groups.values()


def create_private_folder(folder: Path) -> None:
    """Create a folder for this user alone. Raises `StoreError` if it belongs to somebody else, or `OSError`.

    A folder in /tmp has a name that others can guess. Whoever owns it could change the models.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(folder)
