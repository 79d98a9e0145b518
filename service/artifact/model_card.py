"""The model card beside a model file: `README.md` with front matter in the layout of the Hugging Face hub.

Only top-level keys with one value each are read. No YAML reader is needed, and none runs on a file from
elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CARD_FILE: Final = "README.md"
"""Name of the card, beside the model file."""

_MAX_BYTES: Final = 1 << 20
"""Number of bytes of a card that are read."""


@dataclass(frozen=True)
class ModelCard:
    """The facts of a card about the origin of a model; empty texts for what it does not state."""

    source: str = ""
    """Source with its revision, such as `hf:owner/model@<commit>, onnx/model.onnx`."""
    licence: str = ""
    """Licence of the weights by the hub's identifier, such as `apache-2.0`."""
    library: str = ""
    """Program that made the model, such as `transformers`."""


def read_model_card(folder: Path) -> ModelCard:
    """Return the facts of the card in the folder of a model file; all are empty without a card."""
    values = read_front_matter(folder / CARD_FILE)
    return ModelCard(values.get("source", ""), values.get("license", ""), values.get("source_library", ""))


def read_front_matter(path: Path) -> dict[str, str]:
    """Return the keys of a card's front matter whose value is one text; {} without a card or front matter."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    values: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return values
        key, separator, value = line.partition(":")
        if separator and key and not key[0].isspace() and key[0] not in "-#" and value.strip():
            values[key.strip()] = _unquote(value.strip())
    return {}


def _unquote(value: str) -> str:
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value[1:-1].replace("''", "'") if len(value) > 1 and value[0] == value[-1] == "'" else value
