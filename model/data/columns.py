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
from fovea.model.data.inventory import Part, join_names
from fovea.model.data.parts import parse_part
from fovea.model.data.rows import Columns, ParsedTable

_PATH_NAMES: Final = """path filepath filename fname file imagepath imagefile imagefilename imagename
    image imageid imageindex imgpath imgname imgid img picture photo id name"""
_LABEL_NAMES: Final = """label labels class classname classlabel category categories target tag tags breed
    species diagnosis dx findinglabels labelname y classid labelid"""
_SPLIT_NAMES: Final = "split splits datasplit set subset partition usage phase mode part dataset fold"
"""Known column names, the most reliable first; `Image Index` and `image_index` become `imageindex`."""

_PART_FLAGS: Final = {
    **dict.fromkeys(("istrain", "istraining"), Part.TRAIN),
    **dict.fromkeys(("isvalid", "isval", "isvalidation"), Part.VALIDATION),
    "istest": Part.TEST,
}
"""Flag columns that mark a part, such as fastai's `is_valid`."""

_TRUE_VALUES: Final = frozenset({"1", "1.0", "true", "yes"})
_FALSE_VALUES: Final = frozenset({"0", "0.0", "-1", "-1.0", "false", "no", ""})


@dataclass(frozen=True)
class ColumnRoles:
    """The positions of the columns that are read."""

    path_column: int
    label_column: int | None
    """Position of the label column; None if there is a column for each label."""
    label_flags: Mapping[int, str]
    """Labels by the position of their flag column."""
    split_column: int | None
    part_flags: Mapping[int, Part]
    """Parts by the position of the column that marks their images."""
    notes: tuple[str, ...] = ()

    def find_part(self, fields: Sequence[str]) -> Part | None:
        """Return the part that a row names, or None.

        Raises `KeyError` for an unknown name.
        """
        for column, part in self.part_flags.items():
            if fields[column].lower() in _TRUE_VALUES:
                return part
        if self.split_column is None or not fields[self.split_column]:
            return None
        named_part = parse_part(fields[self.split_column])
        if named_part is None:
            raise KeyError(fields[self.split_column])
        return named_part


def rate_columns(columns: Columns, choices: Choices) -> int:
    """Rate how well the columns fit, from 0 (not at all) to 4."""
    keys = [_normalize_name(name) for name in columns]
    user_columns = [name for name in (choices.path_column, *choices.label_columns) if name]
    if user_columns and all(_normalize_name(name) in keys for name in user_columns):
        return 4
    if keys.count("path") == 1 and keys.count("label") == 1:
        return 3
    if len(columns) < 2:
        return 0
    path = _find_known_name(keys, _PATH_NAMES)
    if path is None or keys.count(path) != 1:
        return 0
    return 2 if _find_known_name(keys, _LABEL_NAMES) else 1


def detect_roles(table: ParsedTable, choices: Choices) -> ColumnRoles:
    """Return the meaning of a table's columns.

    Raises `DataError` if the meaning is ambiguous.
    """
    keys = [_normalize_name(name) for name in table.columns]
    path_column = _find_column(table, keys, choices.path_column, _PATH_NAMES, "--path-column")
    if path_column is None:
        raise DataError(
            f"{table.path} needs a column of paths: it has {_format_columns(table)}; name it with "
            "--path-column"
        )
    split_column, part_flags, notes = _find_split_column(table, keys, [path_column])
    other_columns = [
        column
        for column, key in enumerate(keys)
        if column not in (path_column, split_column)
        and column not in part_flags
        and key not in ("", "unnamed0", "index")
    ]
    if len(choices.label_columns) > 1:
        label_flags = {
            column: table.columns[column]
            for name in choices.label_columns
            if (column := _find_column(table, keys, name, "", "--label-column")) is not None
        }
        return ColumnRoles(
            path_column, None, _check_flags(table, label_flags), split_column, part_flags, notes
        )
    user_column = choices.label_columns[0] if choices.label_columns else None
    label_column = _find_column(table, keys, user_column, _LABEL_NAMES, "--label-column", path_column)
    if label_column is None and len(other_columns) == 1:
        label_column = other_columns[0]
    if label_column is not None:
        return ColumnRoles(path_column, label_column, {}, split_column, part_flags, notes)
    if len(other_columns) > 1 and all(_is_flag_column(table, column) for column in other_columns):
        return ColumnRoles(
            path_column,
            None,
            {column: table.columns[column] for column in other_columns},
            split_column,
            part_flags,
            notes,
        )
    raise DataError(
        f"{table.path} needs a column of labels: it has {_format_columns(table)}; name it with "
        "--label-column, and repeat the option if each label has a column of 1 and 0"
    )


def parse_labels(table: ParsedTable, roles: ColumnRoles, line: int, fields: Sequence[str]) -> list[str]:
    """Return the labels of a row as written."""
    if roles.label_column is not None:
        return re.split("[;|]", fields[roles.label_column])
    return [label for column, label in roles.label_flags.items() if fields[column].lower() in _TRUE_VALUES]


def _find_column(
    table: ParsedTable,
    keys: Sequence[str],
    user_column: str | None,
    known_names: str,
    option: str,
    used_column: int | None = None,
) -> int | None:
    """Return the position of the column that the user names, or of the best known column."""
    if user_column is not None:
        if keys.count(_normalize_name(user_column)) != 1:
            raise DataError(
                f"{table.path} has no column {user_column!r} for {option}: it has {_format_columns(table)}"
            )
        return keys.index(_normalize_name(user_column))
    key = _find_known_name([key for column, key in enumerate(keys) if column != used_column], known_names)
    if key is not None and keys.count(key) > 1:
        raise DataError(
            f"{table.path} has several columns {key!r}; rename one, or name another column with {option}"
        )
    return None if key is None else keys.index(key)


def _find_split_column(
    table: ParsedTable, keys: Sequence[str], used_columns: Sequence[int]
) -> tuple[int | None, dict[int, Part], tuple[str, ...]]:
    """Return the part column, the flag columns of parts, and notes on columns that are not used."""
    part_flags = {
        column: _PART_FLAGS[key]
        for column, key in enumerate(keys)
        if key in _PART_FLAGS and _is_flag_column(table, column)
    }
    notes: list[str] = []
    for known_name in _SPLIT_NAMES.split():
        for column in [
            column for column, key in enumerate(keys) if key == known_name and column not in used_columns
        ]:
            values = {fields[column] for _, fields in table.rows} - {""}
            unknown_values = sorted(value for value in values if parse_part(value) is None)
            if known_name == "split" or not unknown_values:
                return column, part_flags, tuple(notes)
            notes.append(
                f"the column {table.columns[column]!r} does not split the data: it has values that name no "
                f"part, such as {join_names(map(repr, unknown_values))}"
            )
    return None, part_flags, tuple(notes)


def _is_flag_column(table: ParsedTable, column: int) -> bool:
    values = {fields[column].lower() for _, fields in table.rows}
    return bool(values & _TRUE_VALUES) and values <= _TRUE_VALUES | _FALSE_VALUES


def _check_flags(table: ParsedTable, flags: dict[int, str]) -> dict[int, str]:
    for column, name in flags.items():
        for line, fields in table.rows:
            if fields[column].lower() not in _TRUE_VALUES | _FALSE_VALUES:
                raise DataError(
                    f"{table.format_position(line)}: the column {name!r} has {fields[column]!r}; if "
                    "--label-column is repeated, each of its columns must hold 1 or 0"
                )
    return flags


def _find_known_name(keys: Sequence[str], known_names: str) -> str | None:
    return next((name for name in known_names.split() if name in keys), None)


def _normalize_name(name: str) -> str:
    """Return a column name without case and separators."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _format_columns(table: ParsedTable) -> str:
    return f"the columns {join_names(map(repr, table.columns), 12)}"
