"""The meaning of a table's columns: images, labels and parts.

The known names come from Kaggle's and Hugging Face's tables. An ambiguous table is an error, and the user
decides with an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fovea.model.data.choices import Choices
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import Part, some
from fovea.model.data.parts import part_of
from fovea.model.data.rows import Columns, Rows

_PATHS: Final = """path filepath filename file imagepath imagefile imagefilename imagename image imageid
    imageindex imgpath imgname imgid img picture photo id name"""
_LABELS: Final = """label labels class classname classlabel category categories target tag tags breed species
    diagnosis dx findinglabels labelname y classid labelid"""
_SPLITS: Final = "split splits datasplit set subset partition usage phase mode part dataset fold"
"""Known column names, the most reliable first; `Image Index` and `image_index` become `imageindex`."""

_IS_PART: Final = {
    **dict.fromkeys(("istrain", "istraining"), Part.TRAIN),
    **dict.fromkeys(("isvalid", "isval", "isvalidation"), Part.VALIDATION),
    "istest": Part.TEST,
}
"""Flag columns that mark a part, such as fastai's `is_valid`."""

_TRUE: Final = frozenset({"1", "1.0", "true", "yes"})
_FALSE: Final = frozenset({"0", "0.0", "-1", "-1.0", "false", "no", ""})


@dataclass(frozen=True)
class Meaning:
    """The positions of the columns that are read."""

    path: int
    label: int | None
    """Position of the label column; None if there is a column for each label."""
    flags: Mapping[int, str]
    """Labels by the position of their flag column."""
    split: int | None
    is_part: Mapping[int, Part]
    """Parts by the position of the column that marks their images."""
    notes: tuple[str, ...] = ()

    def part(self, fields: Sequence[str]) -> Part | None:
        """Return the part that a row names, or None.

        Raises `KeyError` for an unknown name.
        """
        for place, part in self.is_part.items():
            if fields[place].lower() in _TRUE:
                return part
        if self.split is None or not fields[self.split]:
            return None
        part_named = part_of(fields[self.split])
        if part_named is None:
            raise KeyError(fields[self.split])
        return part_named


def rate_columns(columns: Columns, choices: Choices) -> int:
    """Rate how well the columns fit, from 0 (not at all) to 4."""
    keys = [_key(name) for name in columns]
    wanted = [name for name in (choices.path_column, *choices.label_columns) if name]
    if wanted and all(_key(name) in keys for name in wanted):
        return 4
    if keys.count("path") == 1 and keys.count("label") == 1:
        return 3
    if len(columns) < 2:
        return 0
    path = _first(keys, _PATHS)
    if path is None or keys.count(path) != 1:
        return 0
    return 2 if _first(keys, _LABELS) else 1


def meaning_of(table: Rows, choices: Choices) -> Meaning:
    """Return the meaning of a table's columns.

    Raises `DataError` if the meaning is ambiguous.
    """
    keys = [_key(name) for name in table.columns]
    path = _place(table, keys, choices.path_column, _PATHS, "--path-column")
    if path is None:
        raise DataError(f"{table.path} names no images: it has {_shown(table)}; say which with --path-column")
    split, is_part, notes = _split(table, keys, [path])
    others = [
        place
        for place, key in enumerate(keys)
        if place not in (path, split) and place not in is_part and key not in ("", "unnamed0", "index")
    ]
    if len(choices.label_columns) > 1:
        flags = {
            place: table.columns[place]
            for name in choices.label_columns
            if (place := _place(table, keys, name, "", "--label-column")) is not None
        }
        return Meaning(path, None, _flags(table, flags), split, is_part, notes)
    named = choices.label_columns[0] if choices.label_columns else None
    label = _place(table, keys, named, _LABELS, "--label-column", path)
    if label is None and len(others) == 1:
        label = others[0]
    if label is not None:
        return Meaning(path, label, {}, split, is_part, notes)
    if len(others) > 1 and all(_is_flag(table, place) for place in others):
        return Meaning(path, None, {place: table.columns[place] for place in others}, split, is_part, notes)
    raise DataError(
        f"{table.path} needs a column of labels: it has {_shown(table)}; say which with --label-column, more "
        "than once where each label has a column of 1 and 0"
    )


def true_labels(table: Rows, meaning: Meaning, line: int, fields: Sequence[str]) -> list[str]:
    """Return the labels of a row as written."""
    if meaning.label is not None:
        return re.split("[;|]", fields[meaning.label])
    return [label for place, label in meaning.flags.items() if fields[place].lower() in _TRUE]


def _place(
    table: Rows,
    keys: Sequence[str],
    named: str | None,
    known: str,
    option: str,
    taken: int | None = None,
) -> int | None:
    """Return the position of the column that the user names, or of the best known column."""
    if named is not None:
        if keys.count(_key(named)) != 1:
            raise DataError(f"{table.path} has no column {named!r} for {option}: it has {_shown(table)}")
        return keys.index(_key(named))
    key = _first([key for place, key in enumerate(keys) if place != taken], known)
    if key is not None and keys.count(key) > 1:
        raise DataError(f"{table.path} has several columns {key!r}; say which is meant with {option}")
    return None if key is None else keys.index(key)


def _split(
    table: Rows, keys: Sequence[str], taken: Sequence[int]
) -> tuple[int | None, dict[int, Part], tuple[str, ...]]:
    """Return the part column, the flag columns of parts, and notes on columns that are not used."""
    is_part = {
        place: _IS_PART[key] for place, key in enumerate(keys) if key in _IS_PART and _is_flag(table, place)
    }
    notes: list[str] = []
    for known in _SPLITS.split():
        for place in [place for place, key in enumerate(keys) if key == known and place not in taken]:
            values = {fields[place] for _, fields in table.rows} - {""}
            strange = sorted(value for value in values if part_of(value) is None)
            if known == "split" or not strange:
                return place, is_part, tuple(notes)
            notes.append(
                f"the column {table.columns[place]!r} is not read as parts: it has other values, such as "
                f"{some(map(repr, strange))}"
            )
    return None, is_part, tuple(notes)


def _is_flag(table: Rows, place: int) -> bool:
    values = {fields[place].lower() for _, fields in table.rows}
    return bool(values & _TRUE) and values <= _TRUE | _FALSE


def _flags(table: Rows, flags: dict[int, str]) -> dict[int, str]:
    for place, name in flags.items():
        for line, fields in table.rows:
            if fields[place].lower() not in _TRUE | _FALSE:
                raise DataError(
                    f"{table.where(line)}: the column {name!r} has {fields[place]!r}; where --label-column "
                    "is given more than once, each has 1 or 0"
                )
    return flags


def _first(keys: Sequence[str], known: str) -> str | None:
    return next((name for name in known.split() if name in keys), None)


def _key(name: str) -> str:
    """Return a column name without case and separators."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _shown(table: Rows) -> str:
    return f"the columns {some(map(repr, table.columns), 12)}"
