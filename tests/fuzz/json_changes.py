"""Changes of JSON that leave JSON: values are replaced, repeated, renamed and removed.

Changes of single bytes rarely pass the JSON parser, so they would test the parser and not what follows.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, Final

import orjson

from tests.fuzz.target import Mutate

_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1,
    0.5, -0.0, 1e308, 1e-320, "", "a", "0", "1", "null", "\x00", "\ud7ff", "é", "data:image/png;base64,",
    "AAAA", "====",
    "a" * 300, [], {}, [[]], [{}], {"": None}, [0] * 12, [[0, 0, 1, 1]],
)  # fmt: skip
"""Values at the limits of types, and the shortest of each kind."""

_MAX_PLACES: Final = 1000
"""Number of values from which a document is not changed further: repeated repetitions fill the memory."""


def change_json(words: Sequence[str]) -> Mutate:
    """Return a change of JSON. `words` are names of fields, and texts that mean something."""

    def change(content: bytes, choice: random.Random) -> bytes:
        try:
            holder = [orjson.loads(content)]
        except orjson.JSONDecodeError:
            holder = [choice.choice(_VALUES)]
        for _ in range(choice.randint(1, 3)):
            places = _list_places(holder)
            if len(places) > _MAX_PLACES:
                break
            _change_once(holder, places, words, choice)
        try:
            return orjson.dumps(holder[0])
        except (
            orjson.JSONEncodeError,
            RecursionError,
        ):  # half a surrogate pair, or deeper than orjson writes
            return content

    return change


def _change_once(
    holder: list[Any], places: list[tuple[Any, Any]], words: Sequence[str], choice: random.Random
) -> None:
    container, key = choice.choice(places)
    action = choice.randrange(7)
    if action == 0:
        container[key] = copy.deepcopy(choice.choice(_VALUES))
    elif action == 1:
        container[key] = choice.choice(words)
    elif action == 2:  # another value of the same document
        other, other_key = choice.choice(places)
        container[key] = copy.deepcopy(other[other_key])
    elif action == 3 and isinstance(container, dict):
        container[choice.choice(words)] = container.pop(key)
    elif action == 4 and container is not holder:
        del container[key]
    elif action == 5 and isinstance(container, list) and container is not holder:
        container[key:key] = [copy.deepcopy(container[key])] * choice.choice((1, 2, 20))
    elif isinstance(value := container[key], bool | int | float):
        container[key] = choice.choice((value + 1, value - 1, value * 2, -value, float(value), str(value)))
    elif isinstance(value, dict):
        value[choice.choice(words)] = copy.deepcopy(choice.choice(_VALUES))
    else:
        container[key] = [value]


def _list_places(container: Any) -> list[tuple[Any, Any]]:
    """Return the containers and keys of all values, also of nested ones."""
    places: list[tuple[Any, Any]] = []
    containers = [container]
    while containers:
        one = containers.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            places.append((one, key))
            if isinstance(one[key], dict | list):
                containers.append(one[key])
    return places
