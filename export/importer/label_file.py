"""The labels of a foreign model, read from a separate file."""

from __future__ import annotations

import ast
import csv
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from fovea.export.importer.foreign_model import ImportRefused

WORDNET_ID: Final = re.compile(r"n\d{8}")
"""WordNet 3.0 id as in ImageNet, such as `n01440764`."""

_NUMBER_FIRST: Final = re.compile(r"(\d{1,7})\s*(?:[,:;|\t=)]|->|=>|-(?=\s)|\.(?=\s))\s*(\S.*)")
"""Number before a label: `0,tench`, `0: tench`, `0<tab>tench`, `0) tench`, `0. tench`, `0 -> tench`."""

_NUMBER_AND_SPACE: Final = re.compile(r"(\d{1,7}) +(\S.*)")
"""Number and space before a label: `0 tench`, but also labels such as `2 euro`.

The numbers count only if each number from 0 occurs once.
"""

_NUMBER_LAST: Final = re.compile(r"(.*\S)\s*[,:;|\t=]\s*(\d{1,7})")
"""Number after a label: `tench,0`."""

_QUOTED_LABEL: Final = re.compile(r"""(["']).+\1\s*,?""")
"""Quoted label with a comma: `'tench',`."""

_ID_FIRST: Final = re.compile(r"(n\d{8})\s*[,:;|\t ]\s*(\S.*)")
"""WordNet id before a label: `n01440764 tench`, `n01440764,tench`."""

_ID_COLUMN: Final = re.compile(r"(n\d{8})\s*[,;|:]\s*(\S.*)")
"""WordNet id and label in a table of two columns: `n01440764,tench`."""

_BLOCK_START: Final = re.compile(r"\w+\s*:?\s*\{")
"""Block start `item {`, as in label maps of TensorFlow's object detection."""

_ASSIGNMENT: Final = re.compile(r"\w+\s*=\s*[\[{(]")
"""Assignment `labels = [`, as in Python."""

_HEADINGS: Final = frozenset(
    {"label", "labels", "name", "names", "class", "classes", "category", "categories", "synset"}
    | {"classname", "class_name", "labelname", "label_name", "display_name"}
)
"""Headings of a label column."""

_NUMBER_HEADINGS: Final = frozenset(
    {"id", "ids", "index", "idx", "number", "no", "#", "code", "target"}
    | {"class_id", "classid", "class_index", "label_id", "labelid", "label_index", "wnid", "synset_id"}
)
"""Headings of a column with numbers or WordNet ids."""

_MIN_NUMBERED_LINES: Final = 10
"""Number of lines below which lines such as `1 door`, `2 doors` may be labels that begin with a number."""

IdAndLabel: TypeAlias = tuple[str, str]
"""(WordNet id or empty text, label)."""


@dataclass(frozen=True)
class Labels:
    """The labels of the graph's outputs."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    """WordNet id of each label; empty if the file has none."""
    shared_names: tuple[str, ...] = ()
    """Labels that several outputs shared, and that now have the output's number as a suffix."""
    notes: tuple[str, ...] = ()
    """Notes on the interpretation of a file that is not simply one label per line."""


def read_labels(path: Path) -> Labels:
    """Read labels from lines, from a JSON or Python list, or from a map.

    A line may have a number before or after the label (`0,tench`, `0: tench`, `tench,0`), which gives the
    index of the output. A WordNet id may come first. A heading is allowed, and lines may be rows of a CSV
    file. A map goes from numbers to labels (`{"0": "tench"}`), from numbers to Keras' pairs
    (`{"0": ["n01440764", "tench"]}`), or from labels to numbers (`{"tench": 0}`). A map may be the `id2label`
    of a larger map. Raises `ImportRefused`.
    """
    text = _read_text(path)
    notes: list[str] = []
    if text.lstrip()[:1] in ("[", "{"):
        pairs = _from_code(path, text)
    else:
        pairs = _from_lines(path, text, notes)
    names = [name for _, name in pairs]
    if len(names) < 2:
        raise ImportRefused(f"{path} has {len(names)} labels; at least two are needed")
    for index, name in enumerate(names):
        if not name or not name.isprintable():
            raise ImportRefused(f"{path}: label {index} is {name!r}, which cannot be shown")
    unique, shared_names = _make_unique(path, names)
    notes.extend(_find_similar_labels(unique))
    return Labels(unique, tuple(wordnet for wordnet, _ in pairs), shared_names, tuple(notes))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImportRefused(f"cannot read the labels {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ImportRefused(
            f"{path} is not UTF-8 text: save it as UTF-8, with a label on each line"
        ) from None
    if text.lstrip()[:1] == "<" and re.match(r"\s*<(!doctype|html|\?xml|!--)", text, re.IGNORECASE):
        raise ImportRefused(f"{path} is a web page or XML, not a list of labels; download the file itself")
    return text


# --- one label per line --------------------------------------------------------------------------


def _from_lines(path: Path, text: str, notes: list[str]) -> list[IdAndLabel]:
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ImportRefused(f"{path}: line {lines.index('') + 1} is empty; each line is a label")
    if ("}" in lines and any(_BLOCK_START.fullmatch(line) for line in lines)) or any(
        map(_ASSIGNMENT.match, lines[:1])
    ):
        raise ImportRefused(
            f"{path} is written in a language of its own; give its labels one on each line, or as JSON"
        )
    if lines and lines[0].startswith("# ") and not lines[-1].startswith("# "):
        raise ImportRefused(f"{path}: line 1, {lines[0]!r}, looks like a comment; each line is a label")
    if len(lines) > 1 and all(line.startswith("- ") for line in lines):  # YAML
        lines = [_strip_quotes(line[2:].strip()) for line in lines]
    if len(lines) > 1 and all(_QUOTED_LABEL.fullmatch(line) for line in lines):  # a list without brackets
        lines = [_strip_quotes(line.removesuffix(",").strip()) for line in lines]
    for parse in (_from_columns, _from_numbered_lines, _from_headed_lines) if lines else ():
        pairs = parse(path, lines, notes)
        if pairs is not None:
            return pairs
    columns = [_ID_COLUMN.fullmatch(line) for line in lines]
    if all(columns):
        return [(match[1], _strip_quotes(match[2])) for match in columns if match]
    return [(_id_of(line), _replace_tabs(line)) for line in lines]


def _replace_tabs(line: str) -> str:
    return line.replace("\t", " ")


def _strip_quotes(name: str) -> str:
    """Return the label without surrounding quotes."""
    for quote in ('"', "'"):
        if len(name) > 2 and name[0] == name[-1] == quote and quote not in name[1:-1].replace(quote * 2, ""):
            return name[1:-1].replace(quote * 2, quote).strip()
    return name


def _from_numbered_lines(path: Path, lines: Sequence[str], notes: list[str]) -> list[IdAndLabel] | None:
    """Return labels in the order of their numbers; None if the lines have no numbers."""
    ids, rest = _split_ids(lines)
    for pattern, name_at in ((_NUMBER_FIRST, 2), (_NUMBER_LAST, 1), (_NUMBER_AND_SPACE, 2)):
        matches = [pattern.fullmatch(line) for line in rest]
        has_heading = matches[0] is None and len(matches) > 2 and _is_heading(rest[0])
        body = matches[has_heading:]
        if None in body:
            count = sum(match is not None for match in body)
            if pattern is not _NUMBER_AND_SPACE and count >= 2 and 2 * count >= len(body):
                index = body.index(None) + has_heading
                raise ImportRefused(
                    f"{path}: most lines have a number beside the label, but line {index + 1}, "
                    f"{lines[index]!r}, has none; give each line one, or none at all"
                )
            continue
        pairs = [
            (int(match[3 - name_at]), _strip_quotes(match[name_at])) for match in body if match is not None
        ]
        indices, problem = _to_indices([number for number, _ in pairs])
        if pattern is _NUMBER_AND_SPACE and not _are_output_numbers(path, pairs, problem):
            continue
        if problem:
            raise ImportRefused(
                f"{path}: its lines have numbers beside the labels, which should be each from 0 (or from 1) "
                f"on once: {problem}; if they belong to the labels, give these as a JSON list"
            )
        first = min(number for number, _ in pairs)
        notes.append(f"in the order of their numbers, {first} to {first + len(pairs) - 1}")
        if has_heading:
            notes.append(f"without the heading {lines[0]!r}")
        line_ids = ids[has_heading:] if ids else [""] * len(pairs)
        pairs_by_index: dict[int, IdAndLabel] = {}
        for index, (_, name), wordnet in zip(indices, pairs, line_ids, strict=True):
            id_match = _ID_FIRST.fullmatch(name)
            pairs_by_index[index] = (wordnet or _id_of(name), id_match[2] if id_match else name)
        return [pairs_by_index[index] for index in range(len(pairs))]
    return None


def _split_ids(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the WordNet ids that start every line, and the rest of each line: `n02119789 1 kit_fox`."""
    matches = [_ID_FIRST.fullmatch(line) for line in lines]
    if None in matches or not all(match and re.match(r"\d+\s", match[2]) for match in matches):
        return [], list(lines)
    return [match[1] for match in matches if match], [match[2] for match in matches if match]


def _to_indices(numbers: Sequence[int]) -> tuple[list[int], str]:
    """Return the zero-based index for each number, and a description of any fault."""
    first = min(numbers)
    if sorted(numbers) == list(range(first, first + len(numbers))) and first in (0, 1):
        return [number - first for number in numbers], ""
    duplicates = [number for number, count in Counter(numbers).items() if count > 1]
    if duplicates:
        return [], f"{duplicates[0]} is there {numbers.count(duplicates[0])} times"
    missing = next(number for number in range(min(first, 1), max(numbers) + 1) if number not in numbers)
    return [], f"there are {len(numbers)}, up to {max(numbers)}, and none for {missing}"


def _are_output_numbers(path: Path, pairs: Sequence[tuple[int, str]], problem: str) -> bool:
    """Return whether numbers before a space are output numbers.

    Raises `ImportRefused` if that is ambiguous.
    """
    names = [name for _, name in pairs]
    if problem or len(set(names)) < len(names):
        return False  # as in `1 euro`, `2 euro`
    if min(number for number, _ in pairs) == 1 and len(pairs) < _MIN_NUMBERED_LINES:
        raise ImportRefused(
            f"{path}: the numbers from 1 to {len(pairs)} before the labels may be theirs or those of the "
            "outputs; leave them out, or give the labels as a JSON list"
        )
    return True


def _from_headed_lines(path: Path, lines: Sequence[str], notes: list[str]) -> list[IdAndLabel] | None:
    """Return labels below a column heading; None if the first line is not a heading."""
    if len(lines) < 3 or lines[0].strip("\"':").casefold() not in _HEADINGS:
        return None
    notes.append(f"without the heading {lines[0]!r}")
    return [(_id_of(line), _strip_quotes(_replace_tabs(line))) for line in lines[1:]]


def _is_heading(line: str) -> bool:
    words = [word.strip(" \"'").casefold().replace(" ", "_") for word in re.split(r"[,;|:\t]", line)]
    return any(words) and all(word in _HEADINGS | _NUMBER_HEADINGS or not word for word in words)


def _from_columns(path: Path, lines: Sequence[str], notes: list[str]) -> list[IdAndLabel] | None:
    """Return labels of a table with column headings; None if the first line has no such headings."""
    separator = next((one for one in "\t;,|" if one in lines[0]), None) if lines else None
    if separator is None or not _is_heading(lines[0]):
        return None
    rows = list(csv.reader(lines, delimiter=separator))
    heading = [name.strip().casefold().replace(" ", "_") for name in rows[0]]
    names = [place for place, name in enumerate(heading) if name in _HEADINGS]
    numbers = [place for place, name in enumerate(heading) if name in _NUMBER_HEADINGS]
    bad_row = next((number for number, row in enumerate(rows, 1) if len(row) != len(heading)), None)
    if bad_row is not None and len(heading) == 2 and numbers == [0]:
        return None  # `0,tench, Tinca tinca`: a number and the rest of the line
    if bad_row is None:
        columns = [[row[place].strip() for row in rows[1:]] for place in range(len(heading))]
        if not numbers:  # for example `class,label`
            numbers = [place for place in names if all(text.isdecimal() for text in columns[place])][:1]
        wordnet = [place for place in (*names, *numbers) if all(map(WORDNET_ID.fullmatch, columns[place]))]
        names = [place for place in names if place not in (*numbers, *wordnet)]
        numbers = [place for place in numbers if place not in wordnet]
    if bad_row is not None or len(names) != 1 or len(numbers) > 1 or len(wordnet) > 1:
        what = (
            f"line {bad_row} has {len(rows[bad_row - 1])} columns"
            if bad_row
            else f"its columns are {', '.join(rows[0])}"
        )
        raise ImportRefused(
            f"{path}: {what}; one column of labels is needed, called `label`, and at most one of numbers, "
            "called `id`"
        )
    ids = columns[wordnet[0]] if wordnet else [_id_of(name) for name in columns[names[0]]]
    pairs = list(zip(ids, columns[names[0]], strict=True))
    notes.append(f"of the column {rows[0][names[0]].strip()!r}")
    if not numbers:
        return pairs
    texts, title = columns[numbers[0]], rows[0][numbers[0]].strip()
    bad_text = next((text for text in texts if not text.isdecimal()), None)
    indices, problem = (
        ([], f"{bad_text!r} is none") if bad_text is not None else _to_indices([int(text) for text in texts])
    )
    if problem:
        raise ImportRefused(
            f"{path}: the column {title!r} should have each number from 0 (or from 1) on once: {problem}"
        )
    notes.append(f"in the order of {title!r}")
    pairs_by_index = dict(zip(indices, pairs, strict=True))
    return [pairs_by_index[place] for place in range(len(pairs))]


# --- JSON and Python -----------------------------------------------------------------------------


def _from_code(path: Path, text: str) -> list[IdAndLabel]:
    value = _parse_literal(path, text)
    if isinstance(value, dict):
        inner = [
            key for key, one in value.items() if key.casefold() in _HEADINGS and isinstance(one, dict | list)
        ]
        value = value[inner[0]] if len(inner) == 1 and "id2label" not in value else value
    if isinstance(value, dict):
        value = _from_config(path, value)
    if len(value) > 1 and all(isinstance(one, dict) for one in value):
        value = [_to_numbered_pair(one) for one in value]
    if len(value) > 1 and all(_is_numbered_pair(one) for one in value):
        value = _sort_labels(path, _build_unique_map(path, [(str(number), name) for number, name in value]))
    return [_parse_label(path, place, one) for place, one in enumerate(value)]


def _to_numbered_pair(value: dict[str, Any]) -> Any:
    """Return number and label of `{"id": 0, "name": "tench"}`, or the value itself if it has another form."""
    names = [one for key, one in value.items() if key.casefold() in _HEADINGS and isinstance(one, str)]
    numbers = [one for key, one in value.items() if key.casefold() in _NUMBER_HEADINGS and type(one) is int]
    return [numbers[0], names[0]] if len(names) == len(numbers) == 1 else value


def _is_numbered_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and type(value[0]) is int


def _parse_literal(path: Path, text: str) -> Any:
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
        raise ImportRefused(f"{path} begins like JSON, but is not: {reason}") from None
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
            raise ImportRefused(f"{path} has the key {key!r} twice; each may be there once")
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
        raise ImportRefused(f"{requirement}; it has {len(labels)}, and none for {missing}")
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
        return _id_of(value), value.strip()
    is_pair = (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )
    if is_pair and WORDNET_ID.fullmatch(value[0]):
        return value[0], value[1].strip()
    raise ImportRefused(f"{path}: label {index} is {json.dumps(value, default=repr)[:60]}, which is not text")


def _id_of(label: str) -> str:
    id_match = WORDNET_ID.match(label)
    return id_match[0] if id_match else ""


# --- similar labels ------------------------------------------------------------------------------


def _make_unique(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels with a number suffix where several outputs share a label, and the shared labels."""
    normalized_names = [unicodedata.normalize("NFC", name) for name in names]  # é may be one character or two
    counts = Counter(normalized_names)
    unique = tuple(
        f"{one} ({place})" if counts[one] > 1 else name
        for place, (name, one) in enumerate(zip(names, normalized_names, strict=True))
    )
    if len(set(unique)) < len(unique):
        raise ImportRefused(f"{path} has labels twice, and others that end in a number; rename them")
    return unique, tuple(name for name, count in counts.items() if count > 1)


def _find_similar_labels(names: Sequence[str]) -> Iterator[str]:
    """Yield a note on each group of labels that differ only in case, width or spaces."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for group in groups.values():
        if len(group) > 1:
            yield f"{' and '.join(map(repr, group))} differ in case or spaces alone: are they two labels?"


def require_label_count(path: Path, label_count: int, output_count: int) -> None:
    """Raise `ImportRefused` unless there is a label for each of the graph's outputs."""
    if label_count == output_count or (label_count == 2 and output_count == 1):
        return
    sentence = f"{path} has {label_count} labels, the graph gives {output_count} values for an image"
    if output_count == 1:
        raise ImportRefused(f"{sentence}; one value takes two labels, the second of which it is for")
    if (label_count, output_count) == (1000, 1001):
        sentence += (
            ": as TensorFlow's ImageNet models do, it has a background class first; "
            "put a line such as `background` before the others"
        )
    elif (label_count, output_count) == (1001, 1000):
        sentence += "; leave out the background class, as TensorFlow's lists of ImageNet have it first"
    raise ImportRefused(sentence)
