"""Decoding of base64 text, as callers write it in JSON and in forms."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from fovea.service.api.bodies import CHUNK_SIZE
from fovea.service.errors import BadRequest


def from_base64(text: str, location: str) -> bytes:
    """Decode the base64 text at this place of a body.

    The text may be broken into lines, lack its padding, use the URL-safe alphabet (RFC 4648, section 5), or
    be a `data:` URI. Decoding goes piece by piece, because decoding 32 MB at once blocks all other threads
    for 90 ms. Raises `BadRequest`.
    """
    text = _strip_data_scheme(text, location)
    for blank in " \t\r\n":  # line breaks of `base64`, Python's `encodebytes` and YAML
        if blank in text:
            text = text.replace(blank, "")
    for standard, in_urls in ("+-", "/_"):
        if in_urls in text:
            text = text.replace(in_urls, standard)
    padding = len(text) - len(text.rstrip("="))
    text = text.rstrip("=")
    pieces = []
    try:
        if padding > _MAX_PADDING:
            raise binascii.Error("Excess data after padding")
        text += "=" * (-len(text) % 4)
        for start in range(0, len(text), CHUNK_SIZE):
            piece = base64.b64decode(text[start : start + CHUNK_SIZE], validate=True)
            if len(piece) < CHUNK_SIZE // 4 * 3 and start + CHUNK_SIZE < len(text):
                raise binascii.Error("Excess data after padding")
            pieces.append(piece)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{location} is not base64: {error}") from None
    return b"".join(pieces)


_MAX_PADDING: Final = 2
"""Maximum number of padding characters."""


def _strip_data_scheme(text: str, location: str) -> str:
    """Return the base64 part of a `data:` URI (RFC 2397), in which some characters may be percent-encoded."""
    text = text.lstrip()
    if text[: len(_DATA_SCHEME)].lower() != _DATA_SCHEME:
        return text
    comma = text.find(",", 0, _MAX_URI_HEADER)
    if comma < 0 or not text[:comma].rstrip().lower().endswith(";base64"):
        raise BadRequest(f"{location} is a data URI without base64; send `data:image/jpeg;base64,…`")
    text = text[comma + 1 :]
    if "%" in text:
        for code, character in _PERCENT_CODES.items():
            text = text.replace(code, character).replace(code.lower(), character)
    return text


_DATA_SCHEME: Final = "data:"

_MAX_URI_HEADER: Final = 1000
"""Maximum number of characters of a data URI before its data."""

_PERCENT_CODES: Final = {"%2B": "+", "%2F": "/", "%3D": "=", "%0D": "", "%0A": "", "%20": ""}
"""Characters of base64 text that URLs write percent-encoded."""
