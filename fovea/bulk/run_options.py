"""The sources and options of a run: the manifest while it runs, and then the metadata of its table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from fovea.bulk.table_facts import TableFacts

_MAX_VALUE_CHARACTERS: Final = 200
"""Longest value in a message: the shell may expand a pattern to thousands of sources."""

_DESCRIPTIONS: Final = {
    "fovea": "Fovea's version",
    "part_size": "the number of images in a part",
    "sources": "the sources",
    "column": "--column",
    "where": "--where",
    "allowed_hosts": "--allow-host",
    "max_bytes": "FOVEA_BODY_BYTES",
    "max_pixels": "FOVEA_IMAGE_PIXELS",
    "top_k": "--top-k",
    "coverage": "--coverage",
    "digest": "the SHA-256 of the model file",
    "version": "the model's version",
}
"""Descriptions of the keys in messages, where the key itself does not do."""


@dataclass(frozen=True)
class RunOptions:
    """The sources and options on which every row of a table depends."""

    sources: tuple[str, ...]
    column: str | None
    where: str | None
    allowed_hosts: tuple[str, ...]
    """Hosts of URLs that may be read, sorted."""
    max_bytes: int
    """Largest image in bytes."""
    max_pixels: int
    """Largest image in pixels."""
    facts: TableFacts
    engine: str
    """The engine's description of what else the rows depend on."""
    part_size: int
    """Number of entries in a part."""
    fovea: str
    """Version of Fovea."""

    def to_metadata(self) -> dict[str, Any]:
        """Return plain values, as JSON returns them."""
        values = asdict(self)
        del values["facts"]
        plain: dict[str, Any] = json.loads(json.dumps(self.facts._asdict() | values))
        return plain

    @classmethod
    def from_metadata(cls, metadata: Any) -> RunOptions:
        """Return the options from what `to_metadata` returned. Raises `ValueError` for anything else."""
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
        names = [one.name for one in fields(cls) if one.name != "facts"]
        for name in (*TableFacts._fields, *names):
            if name not in metadata:
                raise ValueError(f"its metadata has no {name!r}")
        texts = [metadata[name] for name in ("model", "version", "digest")]
        texts += [] if metadata["where"] is None else [metadata["where"]]
        for name in ("sources", "allowed_hosts"):
            texts += metadata[name] if isinstance(metadata[name], list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its metadata has values of other types")
        values = {name: metadata[name] for name in names}
        values |= {name: tuple(values[name]) for name in ("sources", "allowed_hosts")}
        return cls(**values, facts=TableFacts(**{name: metadata[name] for name in TableFacts._fields}))


def describe_difference(
    previous: Mapping[str, Any], current: Mapping[str, Any], keys: Iterable[str]
) -> str | None:
    """Return the first of the `keys` whose values differ, with both values; None if none does."""
    for key in keys:
        if previous[key] != current[key]:
            name = _DESCRIPTIONS.get(key, f"the {key}")
            return f"{name} {_format_value(previous[key])}, now {_format_value(current[key])}"
    return None


def _format_value(value: Any) -> str:
    if value is None or value == []:
        return "unset"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    count = f" ({len(value):,} in all)" if isinstance(value, list) else ""
    return f"{text[:_MAX_VALUE_CHARACTERS]}…{count}"
