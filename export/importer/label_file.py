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

WORDNET: Final = re.compile(r"n\d{8}")
"""WordNet 3.0 id as in ImageNet, such as `n01440764`."""

_NUMBER_FIRST: Final = re.compile(r"(\d{1,7})\s*(?:[,:;|\t=)]|->|=>|-(?=\s)|\.(?=\s))\s*(\S.*)")
"""Number before a label: `0,tench`, `0: tench`, `0<tab>tench`, `0) tench`, `0. tench`, `0 -> tench`."""

_NUMBER_AND_SPACE: Final = re.compile(r"(\d{1,7}) +(\S.*)")
"""Number and space before a label: `0 tench`, but also labels such as `2 euro`.

The numbers count only if each number from 0 occurs once.
"""

_NUMBER_LAST: Final = re.compile(r"(.*\S)\s*[,:;|\t=]\s*(\d{1,7})")
"""Number after a label: `tench,0`."""

_QUOTED: Final = re.compile(r"""(["']).+\1\s*,?""")
"""Quoted label with a comma: `'tench',`."""

_ID_FIRST: Final = re.compile(r"(n\d{8})\s*[,:;|\t ]\s*(\S.*)")
"""WordNet id before a label: `n01440764 tench`, `n01440764,tench`."""

_ID_COLUMN: Final = re.compile(r"(n\d{8})\s*[,;|:]\s*(\S.*)")
"""WordNet id and label in a table of two columns: `n01440764,tench`."""

_BLOCK: Final = re.compile(r"\w+\s*:?\s*\{")
"""Block start `item {`, as in label maps of TensorFlow's object detection."""

_ASSIGNED: Final = re.compile(r"\w+\s*=\s*[\[{(]")
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

_FEWEST_NUMBERED: Final = 10
"""Number of lines below which lines such as `1 door`, `2 doors` may be labels that begin with a number."""

Pair: TypeAlias = tuple[str, str]
"""(WordNet id or empty text, label)."""


@dataclass(frozen=True)
class Labels:
    """The labels of the graph's outputs."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    """WordNet id of each label; empty if the file has none."""
    renamed: tuple[str, ...] = ()
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
    text = _text(path)
    notes: list[str] = []
    if text.lstrip()[:1] in ("[", "{"):
        found = _from_code(path, text)
    else:
        found = _from_lines(path, text, notes)
    names = [name for _, name in found]
    if len(names) < 2:
        raise ImportRefused(f"{path} has {len(names)} labels; at least two are needed")
    for place, name in enumerate(names):
        if not name or not name.isprintable():
            raise ImportRefused(f"{path}: label {place} is {name!r}, which cannot be shown")
    unique, renamed = _unique(path, names)
    notes.extend(_alike(unique))
    return Labels(unique, tuple(wordnet for wordnet, _ in found), renamed, tuple(notes))


def _text(path: Path) -> str:
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


def _from_lines(path: Path, text: str, notes: list[str]) -> list[Pair]:
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ImportRefused(f"{path}: line {lines.index('') + 1} is empty; each line is a label")
    if ("}" in lines and any(_BLOCK.fullmatch(line) for line in lines)) or any(
        map(_ASSIGNED.match, lines[:1])
    ):
        raise ImportRefused(
            f"{path} is written in a language of its own; give its labels one on each line, or as JSON"
        )
    if lines and lines[0].startswith("# ") and not lines[-1].startswith("# "):
        raise ImportRefused(f"{path}: line 1, {lines[0]!r}, looks like a comment; each line is a label")
    if len(lines) > 1 and all(line.startswith("- ") for line in lines):  # YAML
        lines = [_bare(line[2:].strip()) for line in lines]
    if len(lines) > 1 and all(_QUOTED.fullmatch(line) for line in lines):  # a list without brackets
        lines = [_bare(line.removesuffix(",").strip()) for line in lines]
    for read in (_from_columns, _from_numbered, _from_headed) if lines else ():
        found = read(path, lines, notes)
        if found is not None:
            return found
    columns = [_ID_COLUMN.fullmatch(line) for line in lines]
    if all(columns):
        return [(match[1], _bare(match[2])) for match in columns if match]
    return [(_id_of(line), _spaced(line)) for line in lines]


def _spaced(line: str) -> str:
    return line.replace("\t", " ")


def _bare(name: str) -> str:
    """Return the label without surrounding quotes."""
    for quote in ('"', "'"):
        if len(name) > 2 and name[0] == name[-1] == quote and quote not in name[1:-1].replace(quote * 2, ""):
            return name[1:-1].replace(quote * 2, quote).strip()
    return name


def _from_numbered(path: Path, lines: Sequence[str], notes: list[str]) -> list[Pair] | None:
    """Return labels in the order of their numbers; None if the lines have no numbers."""
    ids, rest = _without_ids(lines)
    for pattern, name_at in ((_NUMBER_FIRST, 2), (_NUMBER_LAST, 1), (_NUMBER_AND_SPACE, 2)):
        matches = [pattern.fullmatch(line) for line in rest]
        headed = matches[0] is None and len(matches) > 2 and _is_heading(rest[0])
        body = matches[headed:]
        if None in body:
            count = sum(match is not None for match in body)
            if pattern is not _NUMBER_AND_SPACE and count >= 2 and 2 * count >= len(body):
                place = body.index(None) + headed
                raise ImportRefused(
                    f"{path}: most lines have a number beside the label, but line {place + 1}, "
                    f"{lines[place]!r}, has none; give each line one, or none at all"
                )
            continue
        pairs = [(int(match[3 - name_at]), _bare(match[name_at])) for match in body if match is not None]
        places, fault = _places([number for number, _ in pairs])
        if pattern is _NUMBER_AND_SPACE and not _are_numbers(path, pairs, fault):
            continue
        if fault:
            raise ImportRefused(
                f"{path}: its lines have numbers beside the labels, which should be each from 0 (or from 1) "
                f"on once: {fault}; if they belong to the labels, give these as a JSON list"
            )
        first = min(number for number, _ in pairs)
        notes.append(f"in the order of their numbers, {first} to {first + len(pairs) - 1}")
        if headed:
            notes.append(f"without the heading {lines[0]!r}")
        beside = ids[headed:] if ids else [""] * len(pairs)
        by_place: dict[int, Pair] = {}
        for place, (_, name), wordnet in zip(places, pairs, beside, strict=True):
            own = _ID_FIRST.fullmatch(name)
            by_place[place] = (wordnet or _id_of(name), own[2] if own else name)
        return [by_place[place] for place in range(len(pairs))]
    return None


def _without_ids(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the WordNet ids that start every line, and the rest of each line: `n02119789 1 kit_fox`."""
    matches = [_ID_FIRST.fullmatch(line) for line in lines]
    if None in matches or not all(match and re.match(r"\d+\s", match[2]) for match in matches):
        return [], list(lines)
    return [match[1] for match in matches if match], [match[2] for match in matches if match]


def _places(numbers: Sequence[int]) -> tuple[list[int], str]:
    """Return the zero-based index for each number, and a description of any fault."""
    first = min(numbers)
    if sorted(numbers) == list(range(first, first + len(numbers))) and first in (0, 1):
        return [number - first for number in numbers], ""
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        return [], f"{twice[0]} is there {numbers.count(twice[0])} times"
    missing = next(number for number in range(min(first, 1), max(numbers) + 1) if number not in numbers)
    return [], f"there are {len(numbers)}, up to {max(numbers)}, and none for {missing}"


def _are_numbers(path: Path, pairs: Sequence[tuple[int, str]], fault: str) -> bool:
    """Return whether numbers before a space are output numbers.

    Raises `ImportRefused` if that is ambiguous.
    """
    names = [name for _, name in pairs]
    if fault or len(set(names)) < len(names):
        return False  # as in `1 euro`, `2 euro`
    if min(number for number, _ in pairs) == 1 and len(pairs) < _FEWEST_NUMBERED:
        raise ImportRefused(
            f"{path}: the numbers from 1 to {len(pairs)} before the labels may be theirs or those of the "
            "outputs; leave them out, or give the labels as a JSON list"
        )
    return True


def _from_headed(path: Path, lines: Sequence[str], notes: list[str]) -> list[Pair] | None:
    """Return labels below a column heading; None if the first line is not a heading."""
    if len(lines) < 3 or lines[0].strip("\"':").casefold() not in _HEADINGS:
        return None
    notes.append(f"without the heading {lines[0]!r}")
    return [(_id_of(line), _bare(_spaced(line))) for line in lines[1:]]


def _is_heading(line: str) -> bool:
    words = [word.strip(" \"'").casefold().replace(" ", "_") for word in re.split(r"[,;|:\t]", line)]
    return any(words) and all(word in _HEADINGS | _NUMBER_HEADINGS or not word for word in words)


def _from_columns(path: Path, lines: Sequence[str], notes: list[str]) -> list[Pair] | None:
    """Return labels of a table with column headings; None if the first line has no such headings."""
    separator = next((one for one in "\t;,|" if one in lines[0]), None) if lines else None
    if separator is None or not _is_heading(lines[0]):
        return None
    rows = list(csv.reader(lines, delimiter=separator))
    heading = [name.strip().casefold().replace(" ", "_") for name in rows[0]]
    names = [place for place, name in enumerate(heading) if name in _HEADINGS]
    numbers = [place for place, name in enumerate(heading) if name in _NUMBER_HEADINGS]
    odd = next((number for number, row in enumerate(rows, 1) if len(row) != len(heading)), None)
    if odd is not None and len(heading) == 2 and numbers == [0]:
        return None  # `0,tench, Tinca tinca`: a number and the rest of the line
    if odd is None:
        columns = [[row[place].strip() for row in rows[1:]] for place in range(len(heading))]
        if not numbers:  # for example `class,label`
            numbers = [place for place in names if all(text.isdecimal() for text in columns[place])][:1]
        wordnet = [place for place in (*names, *numbers) if all(map(WORDNET.fullmatch, columns[place]))]
        names = [place for place in names if place not in (*numbers, *wordnet)]
        numbers = [place for place in numbers if place not in wordnet]
    if odd is not None or len(names) != 1 or len(numbers) > 1 or len(wordnet) > 1:
        what = (
            f"line {odd} has {len(rows[odd - 1])} columns" if odd else f"its columns are {', '.join(rows[0])}"
        )
        raise ImportRefused(
            f"{path}: {what}; one column of labels is needed, called `label`, and at most one of numbers, "
            "called `id`"
        )
    ids = columns[wordnet[0]] if wordnet else [_id_of(name) for name in columns[names[0]]]
    found = list(zip(ids, columns[names[0]], strict=True))
    notes.append(f"of the column {rows[0][names[0]].strip()!r}")
    if not numbers:
        return found
    texts, title = columns[numbers[0]], rows[0][numbers[0]].strip()
    bad = next((text for text in texts if not text.isdecimal()), None)
    places, fault = ([], f"{bad!r} is none") if bad is not None else _places([int(text) for text in texts])
    if fault:
        raise ImportRefused(
            f"{path}: the column {title!r} should have each number from 0 (or from 1) on once: {fault}"
        )
    notes.append(f"in the order of {title!r}")
    by_place = dict(zip(places, found, strict=True))
    return [by_place[place] for place in range(len(found))]


# --- JSON and Python -----------------------------------------------------------------------------


def _from_code(path: Path, text: str) -> list[Pair]:
    value = _value(path, text)
    if isinstance(value, dict):
        inner = [
            key for key, one in value.items() if key.casefold() in _HEADINGS and isinstance(one, dict | list)
        ]
        value = value[inner[0]] if len(inner) == 1 and "id2label" not in value else value
    if isinstance(value, dict):
        value = _of_config(path, value)
    if len(value) > 1 and all(isinstance(one, dict) for one in value):
        value = [_pair(one) for one in value]
    if len(value) > 1 and all(_is_numbered(one) for one in value):
        value = _ordered(path, _map(path, [(str(number), name) for number, name in value]))
    return [_label(path, place, one) for place, one in enumerate(value)]


def _pair(value: dict[str, Any]) -> Any:
    """Return number and label of `{"id": 0, "name": "tench"}`, or the value itself if it has another form."""
    names = [one for key, one in value.items() if key.casefold() in _HEADINGS and isinstance(one, str)]
    numbers = [one for key, one in value.items() if key.casefold() in _NUMBER_HEADINGS and type(one) is int]
    return [numbers[0], names[0]] if len(names) == len(numbers) == 1 else value


def _is_numbered(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and type(value[0]) is int


def _value(path: Path, text: str) -> Any:
    """Return the value of a JSON text or a Python literal; duplicate keys are refused."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _map(path, pairs))
    except ImportRefused:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error)
    try:
        tree = ast.parse(text.strip(), mode="eval")
        _require_single_keys(path, tree)
        value = ast.literal_eval(tree)
    except ImportRefused:
        raise
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ImportRefused(f"{path} begins like JSON, but is not: {reason}") from None
    if not isinstance(value, dict | list):
        raise ImportRefused(f"{path} must be a list of labels, or a map of numbers to labels")
    if isinstance(value, dict):
        return _map(path, [(str(key) if type(key) is int else key, one) for key, one in value.items()])
    return value


def _map(path: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the pairs as a map.

    Raises `ImportRefused` for a duplicate key, because the last value would silently win.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ImportRefused(f"{path} has the key {key!r} twice; each may be there once")
        found[key] = value
    return found


def _require_single_keys(path: Path, tree: ast.Expression) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            _map(path, [(repr(key), None) for key in keys])


def _of_config(path: Path, value: dict[str, Any]) -> list[Any]:
    """Return the labels of a map, which may be a configuration with `id2label`.

    Raises `ImportRefused`.
    """
    if "id2label" not in value:
        return _ordered(path, value)
    labels, inverse = _ordered(path, value["id2label"]), value.get("label2id")
    if isinstance(inverse, dict) and len(inverse) == len(labels):
        for place, label in enumerate(labels):
            said = inverse.get(label) if isinstance(label, str) else place
            if str(said) != str(place):
                raise ImportRefused(
                    f"{path} contradicts itself: id2label has {label!r} as {place}, label2id as {said}"
                )
    return labels


def _ordered(path: Path, labels: Any) -> list[Any]:
    """Return the labels of a map in the order of their numbers.

    Raises `ImportRefused`.
    """
    wanted = f"{path} must map the numbers from 0 on to labels, or labels to these numbers"
    if not isinstance(labels, dict) or not labels:
        raise ImportRefused(wanted)
    both: tuple[list[tuple[int | None, Any]], ...] = (
        [(_number(key), value) for key, value in labels.items()],
        [(_number(value), key) for key, value in labels.items()],
    )
    readings: list[list[tuple[int, Any]]] = []
    for pairs in both:
        numbered = [(number, value) for number, value in pairs if number is not None]
        if len(numbered) == len(labels):
            readings.append(sorted(numbered, key=lambda pair: pair[0]))
    right = [pairs for pairs in readings if [number for number, _ in pairs] == list(range(len(pairs)))]
    # Values that are not text are not labels: {"3": 0, "5": 1} maps labels to numbers.
    texts = [pairs for pairs in right if all(type(value) is not int for _, value in pairs)]
    if not right:
        if not readings:
            raise ImportRefused(wanted)
        numbers = {number for number, _ in readings[0]}
        missing = min(set(range(len(labels) + 1)) - numbers)
        raise ImportRefused(f"{wanted}; it has {len(labels)}, and none for {missing}")
    if len(texts) > 1 and texts[0] != texts[1]:
        raise ImportRefused(
            f"{path} can be read in both directions, as numbers to labels and as labels to numbers; give the "
            "labels as a list"
        )
    return [value for _, value in (texts or right)[0]]


def _number(value: Any) -> int | None:
    if type(value) is int and value >= 0:
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 8 else None


def _label(path: Path, place: int, value: Any) -> Pair:
    """Return the WordNet id, or an empty text, and the label."""
    if isinstance(value, str):
        return _id_of(value), value.strip()
    pair = (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )
    if pair and WORDNET.fullmatch(value[0]):
        return value[0], value[1].strip()
    raise ImportRefused(f"{path}: label {place} is {json.dumps(value, default=repr)[:60]}, which is not text")


def _id_of(label: str) -> str:
    found = WORDNET.match(label)
    return found[0] if found else ""


# --- similar labels ------------------------------------------------------------------------------


def _unique(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels with a number suffix where several outputs share a label, and the shared labels."""
    composed = [unicodedata.normalize("NFC", name) for name in names]  # é may be one character or two
    counts = Counter(composed)
    unique = tuple(
        f"{one} ({place})" if counts[one] > 1 else name
        for place, (name, one) in enumerate(zip(names, composed, strict=True))
    )
    if len(set(unique)) < len(unique):
        raise ImportRefused(f"{path} has labels twice, and others that end in a number; rename them")
    return unique, tuple(name for name, count in counts.items() if count > 1)


def _alike(names: Sequence[str]) -> Iterator[str]:
    """Yield a note on each group of labels that differ only in case, width or spaces."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for group in groups.values():
        if len(group) > 1:
            yield f"{' and '.join(map(repr, group))} differ in case or spaces alone: are they two labels?"


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
    elif (labels, outputs) == (1001, 1000):
        sentence += "; leave out the background class, as TensorFlow's lists of ImageNet have it first"
    raise ImportRefused(sentence)
