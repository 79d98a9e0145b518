"""Folders in object stores: `s3://`, `gs://`, `az://`, `hf://` and more, by fsspec.

fsspec and the package of a store are imported when a store is opened, and never before. All calls block, so
an event loop makes them in another thread. Credentials come from the environment, as each store's own tools
read them; `FSSPEC_S3_ENDPOINT_URL` and similar variables set the options of fsspec.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, BinaryIO, Final, cast

from fovea.service.errors import BodyTooLarge, to_one_line
from fovea.service.remote.store_uri import (
    STORE_SCHEMES,
    StoreError,
    StoreFileNotFound,
    check_store_uri,
    is_safe_path,
)

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1 << 20

_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "s3": {
        # Without these, an unreachable store would take minutes to fail.
        "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}},
        "default_fill_cache": False,
    },
    "az": {"connection_timeout": 5, "read_timeout": 30, "anon": False},
}
"""Options of a store's file system by its scheme. The environment (`FSSPEC_*`) overrides none of them."""

_CREDENTIAL_ERRORS: Final = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
    "GatedRepoError",
}
"""Classes of errors of the stores' packages that say that credentials are missing or wrong."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a store."""

    path: str
    """Path below the store's root, with `/` between the names; never outside of the root."""
    size: int
    """Size in bytes."""
    marker: str
    """Text that changes when the content changes: an ETag, a generation or a time."""
    digest: str | None = None
    """Digest of the content as the store has recorded it, as `md5:hex` or `sha256:hex`; None if unknown."""


class Store:
    """A folder in an object store. All of its methods block, and they raise `StoreError`."""

    def __init__(self, uri: str, file_system: Any, root: str) -> None:
        """Use an fsspec file system; `root` is the path of the folder in its notation."""
        self.uri: Final = uri
        self._file_system: Final = file_system
        self._root: Final = root.rstrip("/")
        fsspec: Any = importlib.import_module("fsspec")
        # fsspec's own `find` takes a folder that cannot be read for an empty one.
        self._finds_by_walking: Final = (
            getattr(type(file_system), "find", None) is fsspec.AbstractFileSystem.find
        )

    def __repr__(self) -> str:
        """Return the class and the URI."""
        return f"<Store {self.uri}>"

    def list_files(self, max_files: int = 100_000) -> list[StoredFile]:
        """Return all files below the root, by path, with as few requests as the store allows.

        Raises `StoreFileNotFound` if there is nothing, and `StoreError` above `max_files`.
        """
        with _Failures(self.uri):
            self._file_system.invalidate_cache()
            if self._finds_by_walking:
                found = self.walk_files()
            else:
                entries = self._file_system.find(self._root, detail=True)
                if not entries and not self._file_system.exists(self._root):
                    raise FileNotFoundError(self._root)
                found = self._describe_files(entries.values())
        files = list(islice(found, max_files + 1))
        if len(files) > max_files:
            raise StoreError(f"{self.uri} has more than {max_files} files; name a folder with fewer")
        return sorted(files, key=lambda one: one.path)

    def walk_files(self) -> Iterator[StoredFile]:
        """Yield all files below the root, folder by folder, so that memory stays small for millions of files.

        The order is stable: files of a folder by name, and then its folders by name.
        """
        with _Failures(self.uri):
            if not self._file_system.exists(self._root):
                raise FileNotFoundError(self._root)
            if self._file_system.isfile(self._root):
                entries: list[Any] = [self._file_system.info(self._root)]
                folders: list[str] = []
            else:
                entries, folders = [], [self._root]
        yield from self._describe_files(entries)
        while folders:
            folder = folders.pop()
            with _Failures(self.uri):
                entries = self._file_system.ls(folder, detail=True)
            entries.sort(key=lambda one: str(one["name"]))
            yield from self._describe_files(entries)
            children = [str(one["name"]) for one in entries if one["type"] == "directory"]
            # A store may list a folder as an entry of itself.
            folders += reversed([one for one in children if one.rstrip("/") != folder.rstrip("/")])

    def describe_file(self, path: str) -> StoredFile:
        """Return the file as it is now. Raises `StoreFileNotFound`."""
        with _Failures(self._name(path)):
            self._file_system.invalidate_cache()
            info = self._file_system.info(self._join(path))
            if info["type"] != "file":
                raise FileNotFoundError(path)
        return StoredFile(path, int(info["size"] or 0), _read_marker(info), _read_digest(info))

    def open_file(self, path: str) -> BinaryIO:
        """Open a file for reading, with seeking, as archives need it.

        Reading raises errors of the store's package: wrap it in `with store.translate_errors(path)`.
        """
        with _Failures(self._name(path)):
            return cast(BinaryIO, self._file_system.open(self._join(path), "rb"))

    def translate_errors(self, path: str = "") -> Any:
        """Return a context that turns every error of the store's package into a `StoreError`."""
        return _Failures(self._name(path))

    def read_file(self, path: str, max_bytes: int) -> bytes:
        """Return the content of a file. Raises `BodyTooLarge` above `max_bytes`."""
        with self.open_file(path) as file, _Failures(self._name(path)):
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise BodyTooLarge(f"{self._name(path)} has more than {max_bytes} bytes (FOVEA_BODY_BYTES)")
        return content

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from `start` to before `end`, with one request.

        The result is shorter if the file ends earlier. `start` must be in the file.
        """
        with _Failures(self._name(path)):
            return bytes(self._file_system.cat_file(self._join(path), start=start, end=end))

    def copy_file(self, stored: StoredFile, target: BinaryIO) -> None:
        """Write the content of a file to `target`, and check that it is the content that `stored` describes.

        Raises `StoreError` if the file changes meanwhile, ends early, or has another digest. A failure of
        `target` is an `OSError`.
        """
        name = self._name(stored.path)
        algorithm, _, expected = (stored.digest or "").partition(":")
        digest = hashlib.new(algorithm, usedforsecurity=False) if algorithm else None
        size = 0
        with self.open_file(stored.path) as file:
            while True:
                with _Failures(name):
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    break
                size += len(chunk)
                if size > stored.size:
                    break
                if digest is not None:
                    digest.update(chunk)
                target.write(chunk)
        now = self.describe_file(stored.path)
        if (now.size, now.marker) != (stored.size, stored.marker):
            raise StoreError(f"{name} changed while it was read")
        if size != stored.size:
            raise StoreError(f"{name} has {stored.size} bytes, but reading gave {size}")
        if digest is not None and digest.hexdigest() != expected:
            raise StoreError(f"{name} has the {algorithm} {expected}, but what was read has another")

    def _join(self, path: str) -> str:
        if not path:
            return self._root
        if not is_safe_path(path):
            raise StoreError(f"{path!r} is not a path below {self.uri}")
        return f"{self._root}/{path}"

    def _name(self, path: str) -> str:
        return f"{self.uri}/{path}" if path else self.uri

    def _describe_files(self, entries: Iterable[Any]) -> Iterator[StoredFile]:
        prefix = f"{self._root}/"
        for info in entries:
            name = str(info["name"])
            if info["type"] != "file" or name.endswith("/"):  # an empty object that stands for a folder
                continue
            path = name.removeprefix(prefix) if name != self._root else ""
            if path and (not name.startswith(prefix) or not is_safe_path(path)):
                log.warning(f"skipped {name!r} in {self.uri}: its name leads out of the folder")
                continue
            yield StoredFile(path, int(info["size"] or 0), _read_marker(info), _read_digest(info))


def open_store(uri: str) -> Store:
    """Open the folder at a URI such as `s3://bucket/zoo`; most stores connect at the first call of a method.

    Raises `StoreError`, one sentence, for a URI that is malformed and for a package that is missing.
    """
    uri = check_store_uri(uri)
    scheme = uri.partition(":")[0]
    module, package, title = STORE_SCHEMES[scheme]
    missing = [
        name
        for name, found in (("fsspec", "fsspec"), (package, module or "fsspec"))
        if importlib.util.find_spec(found) is None
    ]
    if missing:
        command = f"pip install {' '.join(dict.fromkeys(missing))}"
        raise StoreError(f"{scheme}:// is {title} and needs a package that is missing: {command}")
    with _Failures(uri):
        fsspec: Any = importlib.import_module("fsspec")
        options = dict(_OPTIONS.get("az" if scheme.startswith("abfs") else scheme, {}))
        # An instance of its own: a cached one would keep old listings and old credentials.
        file_system, root = fsspec.core.url_to_fs(
            uri, skip_instance_cache=True, use_listings_cache=False, **options
        )
        return Store(uri, file_system, str(root))


def _read_marker(info: Mapping[str, Any]) -> str:
    """Return what the store says about the version of a file. Each store has another name for it."""
    names = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "mtime", "created")
    value = next((info[name] for name in names if info.get(name)), "")
    # A listing may give as a number, or in quotes, what a single file gives otherwise.
    return repr(value.timestamp()) if isinstance(value, datetime) else str(value).strip('"')


def _read_digest(info: Mapping[str, Any]) -> str | None:
    """Return the digest of the content that the store has recorded, or None.

    The ETag of S3 is the MD5 of small objects only, and only without a key of KMS, so it is no digest here.
    """
    lfs = info.get("lfs")
    sha256 = (
        (lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)) if lfs else None
    )
    if isinstance(sha256, str) and len(sha256) == 64:
        return f"sha256:{sha256.lower()}"
    settings = info.get("content_settings")
    md5 = info.get("md5Hash") or (settings.get("content_md5") if isinstance(settings, Mapping) else None)
    if isinstance(md5, str):
        try:
            md5 = base64.b64decode(md5, validate=True)
        except binascii.Error:
            return None
    return f"md5:{bytes(md5).hex()}" if isinstance(md5, bytes | bytearray) and len(md5) == 16 else None


class _Failures:
    """A context that turns the errors of a store's package into `StoreError`, each one sentence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StoreError | BodyTooLarge):
            raise _translate_error(self._name, error) from error


def _translate_error(name: str, error: Exception) -> StoreError:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and len(causes) < 8:
        causes.append(cause)
    classes = {kind.__name__ for one in causes for kind in type(one).__mro__}
    reason = to_one_line(error) or type(error).__name__
    if classes & _CREDENTIAL_ERRORS:
        return StoreError(f"the store has no valid credentials for {name}: {reason}")
    if isinstance(error, FileNotFoundError) or "RepositoryNotFoundError" in classes:
        return StoreFileNotFound(f"there is no {name}, or you may not see it")
    if isinstance(error, PermissionError):
        return StoreError(f"the store denies access to {name}: {reason}")
    if isinstance(error, TimeoutError):
        return StoreError(f"the store did not answer in time about {name}")
    return StoreError(f"cannot read {name}: {reason}")
