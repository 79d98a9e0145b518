"""Labels from a text with one label per line, or from the rows of a table."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_syntax import (
    HEADINGS,
    NUMBER_HEADINGS,
    WORDNET_ID,
    IdAndLabel,
    find_wordnet_id,
)

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

_MIN_NUMBERED_LINES: Final = 10
"""Number of lines below which lines such as `1 door`, `2 doors` may be labels that begin with a number."""


def parse_lines(path: Path, text: str, notes: list[str]) -> list[IdAndLabel]:
    """Return the labels of a text with one label per line, in the order of the outputs.

    The interpretation is appended to `notes` if it is not obvious. Raises `ImportRefused`.
    """
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ImportRefused(f"{path}: line {lines.index('') + 1} is empty; each line is a label")
    if ("}" in lines and any(_BLOCK_START.fullmatch(line) for line in lines)) or any(
        map(_ASSIGNMENT.match, lines[:1])
    ):
        raise ImportRefused(
            f"{path} is neither a list of labels nor JSON; write one label on each line, or use JSON"
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
    return [(find_wordnet_id(line), _replace_tabs(line)) for line in lines]


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
                f"{path}: its lines have numbers beside the labels, which must be each from 0 (or 1) on "
                f"exactly once: {problem}; if they are part of the labels, write the labels as a JSON list"
            )
        first = min(number for number, _ in pairs)
        notes.append(f"in the order of their numbers, {first} to {first + len(pairs) - 1}")
        if has_heading:
            notes.append(f"without the heading {lines[0]!r}")
        line_ids = ids[has_heading:] if ids else [""] * len(pairs)
        pairs_by_index: dict[int, IdAndLabel] = {}
        for index, (_, name), wordnet in zip(indices, pairs, line_ids, strict=True):
            id_match = _ID_FIRST.fullmatch(name)
            pairs_by_index[index] = (wordnet or find_wordnet_id(name), id_match[2] if id_match else name)
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
        return [], f"{duplicates[0]} occurs {numbers.count(duplicates[0])} times"
    missing = next(number for number in range(min(first, 1), max(numbers) + 1) if number not in numbers)
    return [], f"there are {len(numbers)} numbers up to {max(numbers)}, and {missing} is missing"


def _are_output_numbers(path: Path, pairs: Sequence[tuple[int, str]], problem: str) -> bool:
    """Return whether numbers before a space are output numbers.

    Raises `ImportRefused` if that is ambiguous.
    """
    names = [name for _, name in pairs]
    if problem or len(set(names)) < len(names):
        return False  # as in `1 euro`, `2 euro`
    if min(number for number, _ in pairs) == 1 and len(pairs) < _MIN_NUMBERED_LINES:
        raise ImportRefused(
            f"{path}: the numbers from 1 to {len(pairs)} before the labels may be part of the labels "
            "or the numbers of the outputs; remove them, or write the labels as a JSON list"
        )
    return True


def _from_headed_lines(path: Path, lines: Sequence[str], notes: list[str]) -> list[IdAndLabel] | None:
    """Return labels below a column heading; None if the first line is not a heading."""
    if len(lines) < 3 or lines[0].strip("\"':").casefold() not in HEADINGS:
        return None
    notes.append(f"without the heading {lines[0]!r}")
    return [(find_wordnet_id(line), _strip_quotes(_replace_tabs(line))) for line in lines[1:]]


def _is_heading(line: str) -> bool:
    words = [word.strip(" \"'").casefold().replace(" ", "_") for word in re.split(r"[,;|:\t]", line)]
    return any(words) and all(word in HEADINGS | NUMBER_HEADINGS or not word for word in words)


def _from_columns(path: Path, lines: Sequence[str], notes: list[str]) -> list[IdAndLabel] | None:
    """Return labels of a table with column headings; None if the first line has no such headings."""
    separator = next((one for one in "\t;,|" if one in lines[0]), None) if lines else None
    if separator is None or not _is_heading(lines[0]):
        return None
    rows = list(csv.reader(lines, delimiter=separator))
    heading = [name.strip().casefold().replace(" ", "_") for name in rows[0]]
    names = [index for index, name in enumerate(heading) if name in HEADINGS]
    numbers = [index for index, name in enumerate(heading) if name in NUMBER_HEADINGS]
    bad_row = next((number for number, row in enumerate(rows, 1) if len(row) != len(heading)), None)
    if bad_row is not None and len(heading) == 2 and numbers == [0]:
        return None  # `0,tench, Tinca tinca`: a number and the rest of the line
    if bad_row is None:
        columns = [[row[index].strip() for row in rows[1:]] for index in range(len(heading))]
        if not numbers:  # for example `class,label`
            numbers = [index for index in names if all(text.isdecimal() for text in columns[index])][:1]
        wordnet = [index for index in (*names, *numbers) if all(map(WORDNET_ID.fullmatch, columns[index]))]
        names = [index for index in names if index not in (*numbers, *wordnet)]
        numbers = [index for index in numbers if index not in wordnet]
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
    ids = columns[wordnet[0]] if wordnet else [find_wordnet_id(name) for name in columns[names[0]]]
    pairs = list(zip(ids, columns[names[0]], strict=True))
    notes.append(f"from the column {rows[0][names[0]].strip()!r}")
    if not numbers:
        return pairs
    texts, title = columns[numbers[0]], rows[0][numbers[0]].strip()
    bad_text = next((text for text in texts if not text.isdecimal()), None)
    indices, problem = (
        ([], f"{bad_text!r} is not a number")
        if bad_text is not None
        else _to_indices([int(text) for text in texts])
    )
    if problem:
        raise ImportRefused(
            f"{path}: the column {title!r} must have each number from 0 (or 1) on exactly once: {problem}"
        )
    notes.append(f"in the order of {title!r}")
    pairs_by_index = dict(zip(indices, pairs, strict=True))
    return [pairs_by_index[index] for index in range(len(pairs))]
