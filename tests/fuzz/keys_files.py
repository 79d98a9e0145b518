"""Keys files: any bytes are keys that are written back unchanged, or an error that quotes nothing."""

from __future__ import annotations

import random
import re
from typing import Final

from fovea.service.access.keys_file import MAX_KEYS, KeysFileError, parse_keys, render_keys
from tests.fuzz.target import Target, require

_DIGEST: Final = b"2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"


def check_keys(content: bytes) -> bool:
    """Read a keys file."""
    try:
        keys = parse_keys(content)
    except KeysFileError as error:
        for word in re.findall(rb"[^\s:,]{12,}", content):
            require(word.decode("latin-1") not in str(error), "the error quotes the file")
        return False
    require(len(keys) <= MAX_KEYS, "the file has too many keys")
    require(len({key.name for key in keys}) == len(keys), "two keys have one name")
    require(len({key.digest for key in keys}) == len(keys), "one key has two names")
    for key in keys:
        require(len(key.digest) == 32 and bool(key.scopes), f"the key {key.name} is not complete")
    if keys:
        require(parse_keys(render_keys(key.to_line() for key in keys)) == keys, "written keys differ")
    return True


def _make_seeds() -> list[bytes]:
    first = b"phone-app:classify:" + _DIGEST
    second = b"operator:classify,manage,metrics:" + _DIGEST[::-1] + b":2027-06-30"
    return [first + b"\n", b"# a comment \xc3\xa9\n\n" + first + b"\r\n" + second + b"\n", b"#\n"]


def _mutate(content: bytes, choice: random.Random) -> bytes:
    """Change, repeat or remove a field or a line."""
    separator = choice.choice((b"\n", b":", b","))
    parts = content.split(separator)
    place = choice.randrange(len(parts))
    action = choice.randrange(4)
    if action == 0:
        del parts[place]
    elif action == 1:
        parts.insert(place, choice.choice(parts))
    elif action == 2:
        parts[place] = bytes(choice.sample(parts[place], len(parts[place])))
    else:
        parts[place] += choice.choice((b" ", b"\r", b"\0", b"x", b"\xff", b"9"))
    return separator.join(parts)


TARGET: Final = Target(
    check_keys,
    _make_seeds,
    _mutate,
    words=(
        b"classify",
        b"explain",
        b"manage",
        b"metrics",
        b"2027-06-30",
        b"9999-12-31",
        b"0000-01-01",
        _DIGEST,
    ),
    max_size=2000,
)
