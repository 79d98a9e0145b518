"""The spelling of labels. Needs no PyTorch."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_INVISIBLE_CHARACTERS: Final = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
"""Invisible characters that are not white space."""


def clean_label(name: str) -> str:
    """Return the label in composed form (Unicode NFC), without surrounding white space."""
    return unicodedata.normalize("NFC", name).strip().strip(_INVISIBLE_CHARACTERS).strip()


def normalize_label(label: str) -> str:
    """Return a common form of similar labels."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", unicodedata.normalize("NFKC", label).casefold())
