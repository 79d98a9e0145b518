"""What sources give: names, and the content or the error of each entry."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

from fovea.bulk.inputs import list_entries
from fovea.errors import FileError, RequestError
from fovea.service.image_files import ImageEntry

MAX_BYTES = 100_000


def read_entries(entries: Iterable[ImageEntry], max_bytes: int = MAX_BYTES) -> list[tuple[str, bytes | str]]:
    """Return the name of each entry with its content, or with the code and the message of its error.

    Every entry goes through pickle first, as to another process.
    """
    rows: list[tuple[str, bytes | str]] = []
    for entry in entries:
        copy: ImageEntry = pickle.loads(pickle.dumps(entry))  # noqa: S301 - our own
        assert copy == entry
        copy.name.encode()  # a table holds UTF-8
        try:
            rows.append((copy.name, copy.read(max_bytes)))
        except (FileError, RequestError) as error:
            rows.append((copy.name, f"{error.code}: {error}"))
    return rows


def read_sources(*sources: Any, max_bytes: int = MAX_BYTES, **options: Any) -> list[tuple[str, bytes | str]]:
    """Return what `read_entries` returns for the entries of sources."""
    return read_entries(
        list_entries([str(one) for one in sources], max_bytes=max_bytes, **options), max_bytes
    )
