"""Names of folders and files that every usual file system accepts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

_MAX_FOLDER_BYTES: Final = 120
"""Longest name of a folder in UTF-8. File systems accept 255 bytes."""

_MAX_FILE_BYTES: Final = 220
"""Longest name of a file in UTF-8, before a suffix for a second file of that name."""

_MAX_ENDING_BYTES: Final = 20
"""Longest ending such as `.jpeg` that a shortened name keeps."""

_FORBIDDEN_CHARACTERS: Final = re.compile(r'[/\\:*?"<>|]')
"""Characters that Windows or network drives refuse in names."""

_PATH_CHARACTERS: Final = re.compile(r"[/\\]")

_RESERVED_NAMES: Final = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
)
"""Names of devices on Windows, also before a dot."""


def name_folders(labels: Sequence[str]) -> dict[str, str]:
    """Return the name of a folder for each label, different also on systems that ignore case.

    The names depend on nothing but the labels and their order.
    """
    names: dict[str, str] = {}
    used_names: set[str] = set()
    for label in labels:
        plain_name = _make_folder_name(label)
        name, number = plain_name, 2
        while _ignore_case(name) in used_names:
            name, number = f"{plain_name}-{number}", number + 1
        used_names.add(_ignore_case(name))
        names[label] = name
    return names


def _make_folder_name(label: str) -> str:
    name = _FORBIDDEN_CHARACTERS.sub("_", _replace_invisible(label))
    name = _shorten(name, _MAX_FOLDER_BYTES).strip().rstrip(".").rstrip()
    if name.startswith("."):
        name = f"_{name[1:]}"  # a hidden folder would not be found again
    if name.split(".")[0].lower() in _RESERVED_NAMES:
        name = f"{name}_"
    return name or "_"


def name_file(path: str) -> str:
    """Return the name of the file for an image of this path or URI."""
    if path.partition("://")[0].lower() in ("http", "https") and "://" in path:
        path = unquote(urlsplit(path).path)
    name = _PATH_CHARACTERS.sub("_", _replace_invisible(path.rstrip("/").rpartition("/")[2]))
    if len(name.encode()) > _MAX_FILE_BYTES:
        ending = PurePosixPath(name).suffix
        if len(ending.encode()) > _MAX_ENDING_BYTES:
            ending = ""
        name = _shorten(name.removesuffix(ending), _MAX_FILE_BYTES - len(ending.encode())) + ending
    return name if name.strip(".") else "image"


def generate_names(name: str, path: str) -> Iterator[str]:
    """Yield names for an image, the first free one of which is its own.

    The second name holds a digest of the image's path, so that it is the same in each run.
    """
    yield name
    ending = PurePosixPath(name).suffix
    stem = name.removesuffix(ending)
    digest = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:8]
    yield f"{stem}-{digest}{ending}"
    for number in count(2):
        yield f"{stem}-{digest}-{number}{ending}"


def _replace_invisible(text: str) -> str:
    """Replace control characters, and characters that UTF-8 cannot encode."""
    return "".join("_" if unicodedata.category(one) in ("Cc", "Cs") else one for one in text)


def _shorten(text: str, max_bytes: int) -> str:
    """Cut a text to at most `max_bytes` bytes of UTF-8, between characters."""
    return text.encode()[:max_bytes].decode(errors="ignore")


def _ignore_case(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
