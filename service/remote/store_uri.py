"""URIs of object stores, the packages that open them, and the folders of their copies.

Imports no package outside the standard library.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from fovea.service.errors import FoveaError


class StoreError(FoveaError):
    """An object store cannot be opened, listed or read."""


class StoreFileNotFound(StoreError):
    """A store has no such bucket, folder or file."""


class StoreScheme(NamedTuple):
    """A kind of store."""

    module: str | None
    """Module that fsspec needs for it; None if fsspec alone is enough."""
    package: str
    """Package to install."""
    title: str


STORE_SCHEMES: Final = {
    "s3": StoreScheme("s3fs", "s3fs", "Amazon S3 and compatible stores"),
    "gs": StoreScheme("gcsfs", "gcsfs", "Google Cloud Storage"),
    "az": StoreScheme("adlfs", "adlfs", "Azure Blob Storage"),
    "abfs": StoreScheme("adlfs", "adlfs", "Azure Blob Storage"),
    "abfss": StoreScheme("adlfs", "adlfs", "Azure Blob Storage"),
    "hf": StoreScheme("huggingface_hub", "huggingface_hub", "Hugging Face Hub"),
    "file": StoreScheme(None, "fsspec", "a folder of this machine"),
    "memory": StoreScheme(None, "fsspec", "the memory of this process, for tests"),
}
"""The stores that Fovea opens, by the scheme of their URI."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""The start of a URI. A scheme has two letters or more, because `C:` is a drive."""


def has_scheme(text: str) -> bool:
    """Return True if the text begins as a URI does, of whatever scheme."""
    return _SCHEME.match(text) is not None


def check_store_uri(uri: str) -> str:
    """Return the URI without a slash at its end.

    Raises `StoreError` for an unknown scheme, a missing bucket, credentials in the URI and unsafe names.
    """
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else ""
    if scheme not in STORE_SCHEMES:
        known = ", ".join(f"{one}://" for one in STORE_SCHEMES if one not in ("file", "memory"))
        raise StoreError(f"{hide_credentials(uri)!r} is not the URI of a store; Fovea knows {known}")
    try:
        parts = urlsplit(uri)
        has_credentials = ":" in parts.netloc.rpartition("@")[0] or parts.password is not None
    except ValueError as error:
        raise StoreError(f"{hide_credentials(uri)!r} is not a URI: {error}") from None
    if has_credentials:
        raise StoreError(
            f"{hide_credentials(uri)!r} has credentials in it, which would show in logs; give them by the "
            "environment, as the store's own tools read them"
        )
    if parts.query or parts.fragment:
        raise StoreError(f"{uri!r} has a query or a fragment; give the bucket and the folder only")
    path = parts.path.rstrip("/")
    if not parts.netloc and (scheme not in ("file", "memory") or not path):
        raise StoreError(f"{uri!r} names no bucket; write {scheme}://bucket/folder")
    if not is_safe_path(f"{parts.netloc}{path}".lstrip("/")):
        raise StoreError(f"{uri!r} has an empty name, '.', '..' or a control character in its path")
    return f"{scheme}://{parts.netloc}{path}"


def is_safe_path(path: str) -> bool:
    """Return True if a relative path stays below its root on every file system.

    A key of an object store may be any text, such as `../../etc/passwd`.
    """
    decoded = unquote(path)
    return all(
        name not in ("", ".", "..") and "\\" not in name and all(ord(one) >= 32 for one in name)
        for text in (path, decoded)
        for name in text.split("/")
    )


def hide_credentials(uri: str) -> str:
    """Return a URI without user name and password, for messages."""
    return re.sub(r"(?<=://)[^/@]*:[^/@]*@", "***@", uri)


def find_copy_folder(uri: str, cache: Path | None) -> Path:
    """Return the folder of the copy of a store. It need not exist.

    Without `cache` it is in `XDG_CACHE_HOME` or `~/.cache`, or in the system's folder for temporary files if
    there is no home that can be written to, as in a container.
    """
    words = re.sub(r"[^A-Za-z0-9.]+", "-", uri).strip("-.")[-60:]
    name = f"{words}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    if cache is not None:
        return cache / name
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        home = Path()
    existing = next((one for one in (home, *home.parents) if one.exists()), Path("/"))
    if home.is_absolute() and os.access(existing, os.W_OK | os.X_OK):
        return home / "fovea" / "models" / name
    return Path(tempfile.gettempdir()) / f"fovea-models-{os.geteuid()}-{name}"


def require_private(folder: Path) -> None:
    """Raise `StoreError` if somebody else could change the models in a folder of a copy, or `OSError`.

    A folder in /tmp has a name that others can guess.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(
            f"{folder} belongs to another user, is a link, or others may write to it; set FOVEA_MODEL_CACHE"
        )
