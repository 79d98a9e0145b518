"""The labels of a foreign model, from the file that comes with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from export.foreign import ImportRefused

WORDNET: Final = re.compile(r"n\d{8}")
"""An id of WordNet 3.0 as ImageNet uses them, such as `n01440764`."""


@dataclass(frozen=True)
class Labels:
    """What each of the outputs is called."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    """The WordNet id of each, where the file has them, else empty."""
    renamed: tuple[str, ...] = ()
    """Labels that stood for several outputs, and now have the output's number behind them."""


def read_labels(path: Path) -> Labels:
    """Read one label a line, a JSON list, or a JSON map. Raises `ImportRefused`.

    A map goes from numbers to labels (`{"0": "tench"}`), from numbers to Keras' pairs
    (`{"0": ["n01440764", "tench"]}`), or from labels to numbers (`{"tench": 0}`); it may be the `id2label` of
    a larger one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ImportRefused(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ImportRefused(f"cannot read the labels {path}: {error.strerror}") from None
    found = _from_json(path, text) if text.lstrip()[:1] in ("[", "{") else _from_lines(path, text)
    names = [name for _, name in found]
    if len(names) < 2:
        raise ImportRefused(f"{path} has {len(names)} labels; at least two are needed")
    for place, name in enumerate(names):
        if not name or not name.isprintable():
            raise ImportRefused(f"{path}: label {place} is {name!r}, which cannot be shown")
    unique, renamed = _unique(path, names)
    return Labels(unique, tuple(wordnet for wordnet, _ in found), renamed)


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    lines = [line.replace("\t", " ").strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ImportRefused(f"{path}: line {lines.index('') + 1} is empty; each line is a label")
    return [(_id_of(line), line) for line in lines]


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} begins like JSON, but is not: {error}") from None
    if isinstance(value, dict):
        value = _ordered(path, value.get("id2label", value))
    return [_label(path, place, one) for place, one in enumerate(value)]


def _ordered(path: Path, labels: Any) -> list[Any]:
    """The labels of a map in the order of their numbers."""
    wanted = f"{path} must map the numbers from 0 on to labels, or labels to these numbers"
    if not isinstance(labels, dict) or not labels:
        raise ImportRefused(wanted)
    if all(type(value) is int for value in labels.values()):
        pairs = [(value, key) for key, value in labels.items()]
    elif all(key.isdecimal() for key in labels):
        pairs = [(int(key), value) for key, value in labels.items()]
    else:
        raise ImportRefused(wanted)
    pairs.sort(key=lambda pair: pair[0])
    if [place for place, _ in pairs] != list(range(len(pairs))):
        missing = min(set(range(len(pairs))) - {place for place, _ in pairs})
        raise ImportRefused(f"{wanted}; it has {len(pairs)}, and none for {missing}")
    return [value for _, value in pairs]


def _label(path: Path, place: int, value: Any) -> tuple[str, str]:
    """WordNet id, if there is one, and label."""
    if isinstance(value, str):
        return _id_of(value), value.strip()
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    if pair and WORDNET.fullmatch(value[0]):
        return value[0], value[1].strip()
    raise ImportRefused(f"{path}: label {place} is {json.dumps(value)[:60]}, which is not text")


def _id_of(label: str) -> str:
    found = WORDNET.match(label)
    return found[0] if found else ""


def _unique(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels with their number where one stands for several; and which these are."""
    counts = Counter(names)
    unique = tuple(f"{name} ({place})" if counts[name] > 1 else name for place, name in enumerate(names))
    if len(set(unique)) < len(unique):
        raise ImportRefused(f"{path} has labels twice, and others that end in a number; rename them")
    return unique, tuple(name for name, count in counts.items() if count > 1)


def require_count(path: Path, labels: int, outputs: int) -> None:
    """Raise `ImportRefused` unless there is a label for each of the graph's outputs."""
    if labels == outputs or (labels == 2 and outputs == 1):
        return
    sentence = f"{path} has {labels} labels, the graph gives {outputs} values for an image"
    if outputs == 1:
        raise ImportRefused(f"{sentence}; one value takes two labels, the second of which it is for")
    if (labels, outputs) == (1000, 1001):
        sentence += (
            ": as TensorFlow's ImageNet models do, it has a background class first; "
            "put a line such as `background` before the others"
        )
    raise ImportRefused(sentence)
