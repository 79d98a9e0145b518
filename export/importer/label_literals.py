"""Labels from a list or map in JSON or Python."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_syntax import (
    HEADINGS,
    NUMBER_HEADINGS,
    WORDNET_ID,
    IdAndLabel,
    find_wordnet_id,
)

_CONFIG_KEYS: Final = frozenset({"model_type", "architectures", "transformers_version", "architecture"})
"""Keys of a `config.json` of transformers or timm."""


def parse_literal(path: Path, text: str) -> list[IdAndLabel]:
    """Return the labels of a JSON or Python literal, in the order of the outputs.

    Raises `ImportRefused`.
    """
    value = _evaluate_literal(path, text)
    if isinstance(value, dict):
        inner = [
            key for key, one in value.items() if key.casefold() in HEADINGS and isinstance(one, dict | list)
        ]
        value = value[inner[0]] if len(inner) == 1 and "id2label" not in value else value
    if isinstance(value, dict):
        value = _from_config(path, value)
    if len(value) > 1 and all(isinstance(one, dict) for one in value):
        value = [_to_numbered_pair(one) for one in value]
    if len(value) > 1 and all(_is_numbered_pair(one) for one in value):
        value = _sort_labels(path, _build_unique_map(path, [(str(number), name) for number, name in value]))
    return [_parse_label(path, index, one) for index, one in enumerate(value)]


def _to_numbered_pair(value: dict[str, Any]) -> Any:
    """Return number and label of `{"id": 0, "name": "tench"}`, or the value itself if it has another form."""
    names = [one for key, one in value.items() if key.casefold() in HEADINGS and isinstance(one, str)]
    numbers = [one for key, one in value.items() if key.casefold() in NUMBER_HEADINGS and type(one) is int]
    return [numbers[0], names[0]] if len(names) == len(numbers) == 1 else value


def _is_numbered_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and type(value[0]) is int


def _evaluate_literal(path: Path, text: str) -> Any:
    """Return the value of a JSON text or a Python literal; duplicate keys are refused."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _build_unique_map(path, pairs))
    except ImportRefused:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        _require_unique_keys(path, tree)
        value = ast.literal_eval(tree)
    except ImportRefused:
        raise
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ImportRefused(f"{path} begins like JSON, but is not valid: {reason}") from None
    if not isinstance(value, dict | list):
        raise ImportRefused(f"{path} must be a list of labels, or a map of numbers to labels")
    if isinstance(value, dict):
        return _build_unique_map(
            path, [(str(key) if type(key) is int else key, one) for key, one in value.items()]
        )
    return value


def _build_unique_map(path: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the pairs as a map.

    Raises `ImportRefused` for a duplicate key, because the last value would silently win.
    """
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ImportRefused(f"{path} has the key {key!r} twice; each key must be unique")
        mapping[key] = value
    return mapping


def _require_unique_keys(path: Path, tree: ast.Expression) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            _build_unique_map(path, [(repr(key), None) for key in keys])


def _from_config(path: Path, value: dict[str, Any]) -> list[Any]:
    """Return the labels of a map, which may be a configuration with `id2label`.

    Raises `ImportRefused`.
    """
    if all(type(one) is int for one in value.values()):
        return _sort_labels(path, value)  # from labels to numbers; one of the labels may be "id2label"
    if "id2label" not in value and not _CONFIG_KEYS.isdisjoint(value):
        raise ImportRefused(
            f"{path} has no id2label: it configures a model without naming its labels; give a file with one "
            "label per line"
        )
    if "id2label" not in value:
        return _sort_labels(path, value)
    labels, inverse = _sort_labels(path, value["id2label"]), value.get("label2id")
    if isinstance(inverse, dict) and len(inverse) == len(labels):
        for index, label in enumerate(labels):
            number = inverse.get(label) if isinstance(label, str) else index
            if str(number) != str(index):
                raise ImportRefused(
                    f"{path} contradicts itself: id2label has {label!r} as {index}, label2id as {number}"
                )
    return labels


def _sort_labels(path: Path, labels: Any) -> list[Any]:
    """Return the labels of a map in the order of their numbers.

    Raises `ImportRefused`.
    """
    requirement = f"{path} must map the numbers from 0 on to labels, or labels to these numbers"
    if not isinstance(labels, dict) or not labels:
        raise ImportRefused(requirement)
    directions: tuple[list[tuple[int | None, Any]], ...] = (
        [(_parse_number(key), value) for key, value in labels.items()],
        [(_parse_number(value), key) for key, value in labels.items()],
    )
    readings: list[list[tuple[int, Any]]] = []
    for pairs in directions:
        numbered_labels = [(number, value) for number, value in pairs if number is not None]
        if len(numbered_labels) == len(labels):
            readings.append(sorted(numbered_labels, key=lambda pair: pair[0]))
    complete_readings = [
        pairs for pairs in readings if [number for number, _ in pairs] == list(range(len(pairs)))
    ]
    # Values that are not text are not labels: {"3": 0, "5": 1} maps labels to numbers.
    text_readings = [
        pairs for pairs in complete_readings if all(type(value) is not int for _, value in pairs)
    ]
    if not complete_readings:
        if not readings:
            raise ImportRefused(requirement)
        numbers = {number for number, _ in readings[0]}
        missing = min(set(range(len(labels) + 1)) - numbers)
        raise ImportRefused(f"{requirement}; it has {len(labels)} entries, and none for {missing}")
    if len(text_readings) > 1 and text_readings[0] != text_readings[1]:
        raise ImportRefused(
            f"{path} can be read in both directions, as numbers to labels and as labels to numbers; give the "
            "labels as a list"
        )
    return [value for _, value in (text_readings or complete_readings)[0]]


def _parse_number(value: Any) -> int | None:
    if type(value) is int and value >= 0:
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 8 else None


def _parse_label(path: Path, index: int, value: Any) -> IdAndLabel:
    """Return the WordNet id, or an empty text, and the label."""
    if isinstance(value, str):
        return find_wordnet_id(value), value.strip()
    is_pair = (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )
    if is_pair and WORDNET_ID.fullmatch(value[0]):
        return value[0], value[1].strip()
    raise ImportRefused(f"{path}: label {index} is {json.dumps(value, default=repr)[:60]}, which is not text")
