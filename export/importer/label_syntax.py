"""Elements that lists and maps of labels share: WordNet ids and names of columns and keys."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

WORDNET_ID: Final = re.compile(r"n\d{8}")
"""WordNet 3.0 id as in ImageNet, such as `n01440764`."""

HEADINGS: Final = frozenset(
    {"label", "labels", "name", "names", "class", "classes", "category", "categories", "synset"}
    | {"classname", "class_name", "labelname", "label_name", "display_name"}
)
"""Headings of a label column."""

NUMBER_HEADINGS: Final = frozenset(
    {"id", "ids", "index", "idx", "number", "no", "#", "code", "target"}
    | {"class_id", "classid", "class_index", "label_id", "labelid", "label_index", "wnid", "synset_id"}
)
"""Headings of a column with numbers or WordNet ids."""

IdAndLabel: TypeAlias = tuple[str, str]
"""(WordNet id or empty text, label)."""


def find_wordnet_id(label: str) -> str:
    """Return the WordNet id at the start of the label; empty if there is none."""
    id_match = WORDNET_ID.match(label)
    return id_match[0] if id_match else ""
