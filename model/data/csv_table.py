"""Labelled images in a CSV or JSON lines file, with columns for image, label and part.

Paths are relative to the file. Several labels of one image can stand in one field, separated by `;` or `|`,
in several rows, or in a column for each label. The set is then multi-label, and an image without labels means
that no label is true.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

from fovea.model.data.choices import Choices
from fovea.model.data.clutter import find_clutter
from fovea.model.data.columns import ColumnRoles, detect_roles, parse_labels, rate_columns
from fovea.model.data.disk_source import DiskSource, Folder, explain_file_rejection
from fovea.model.data.examples import DataError
from fovea.model.data.formats import has_image_suffix
from fovea.model.data.inventory import (
    File,
    Inventory,
    Part,
    format_count,
    group_skipped_files,
    join_names,
    to_printable,
)
from fovea.model.data.labels import describe_spellings
from fovea.model.data.parts import parse_part
from fovea.model.data.rows import SUFFIXES, ParsedTable, read_table
from fovea.model.data.sources import Survey
from fovea.model.data.spelling import clean_label

_MAX_NAMES: Final = 5

_PART_NAMES: Final = {Part.TRAIN: "training", Part.VALIDATION: "validation", Part.TEST: "test"}


def is_table(name: str) -> bool:
    """Return whether the file has a table's suffix."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


class Table(DiskSource):
    """The images that one or several CSV files in a folder name."""

    def __init__(self, *paths: Path, choices: Choices | None = None, root: Path | None = None) -> None:
        """Create the source.

        `root` is a folder that contains the files, directly or below; the default is the folder of the first
        file.
        """
        super().__init__(root or paths[0].parent)
        self.table_paths = paths
        self.choices = choices or Choices()

    @property
    def name(self) -> str:
        """The file's name, or the folder's name if there are several files."""
        if len(self.table_paths) == 1:
            return to_printable(self.table_paths[0].name)
        return to_printable(self.root.absolute().name)

    @cached_property
    def survey(self) -> Survey:
        """The named images, and the images beside them that are not named.

        Raises `DataError`.
        """
        entries = _ImageEntries(self.root, self._display_path)
        columns: dict[str, None] = {}
        notes: list[str] = []
        parts: dict[Part, set[str]] = {}
        ordered_paths = sorted(
            self.table_paths, key=lambda path: list(Part).index(self._parse_table_part(path) or Part.TRAIN)
        )
        for path in ordered_paths:
            try:
                table = read_table(path, lambda header: rate_columns(header, self.choices))
                roles = detect_roles(table, self.choices)
                if columns and _describe_column(table, roles) not in columns:
                    raise DataError(
                        f"{path} has its labels in {_describe_column(table, roles)}, but the tables before "
                        f"it in {', '.join(columns)}"
                    )
            except DataError as error:
                if self._parse_table_part(path) is not Part.TEST:
                    raise
                notes.append(f"{path.name} is not used: {error}")  # a contest, whose labels are secret
                continue
            entries.add(table, roles, self._parse_table_part(path))
            columns |= {_describe_column(table, roles): None}
            notes += [*table.notes, *roles.notes]
            for part, names in _collect_part_names(table, roles, self._parse_table_part(path)).items():
                parts.setdefault(part, set()).update(names)
        files = entries.list_files()
        other_images = _find_other_images(self.root, {file.name for file in files})
        skipped_files = {name: (f"in {folder}", f"not named in {self.name}") for name, folder in other_images}
        inventory = Inventory(
            len(files) + len(skipped_files),
            {part: tuple(sorted(parts[part])) for part in Part if part in parts},
            f"in {', '.join(columns)}",
            group_skipped_files(skipped_files),
            tuple(map(to_printable, (*notes, *entries.describe_decisions()))),
        )
        return Survey(files, inventory)

    @property
    def _display_path(self) -> str:
        return str(self.table_paths[0] if len(self.table_paths) == 1 else self.root)

    def _parse_table_part(self, path: Path) -> Part | None:
        """Return the part that a file's name or folder states, if there are several files."""
        if len(self.table_paths) == 1:
            return None
        return parse_part(path.stem) or parse_part(path.parent.name)


class _ImageEntries:
    """The images that the rows name, with their labels and parts."""

    def __init__(self, root: Path, display_path: str) -> None:
        self.root, self.display_path = root, display_path
        self._path_lookup = _PathLookup(root)
        self._labels: dict[str, set[str]] = {}
        self._parts: dict[str, Part] = {}
        self._raw_labels: set[str] = set()
        self._missing_paths: list[str] = []
        self._flags = False

    def add(self, table: ParsedTable, roles: ColumnRoles, own_part: Part | None) -> None:
        """Add the rows of a table.

        Raises `DataError`.
        """
        base = table.path.parent.relative_to(self.root).as_posix()
        for line, fields in table.rows:
            path = fields[roles.path_column]
            if not path:
                raise DataError(f"{table.format_position(line)}: the path is empty")
            try:
                part = roles.find_part(fields) or own_part or Part.TRAIN
            except KeyError as error:
                raise DataError(
                    f"{table.format_position(line)}: the split is {error.args[0]!r}; use train, val, "
                    "validation, dev, test, eval or another word for one of these"
                ) from None
            name = self._path_lookup.find_file(path, base, part)
            if name is None:
                self._missing_paths.append(str(PurePosixPath(path)))
                name = str(PurePosixPath(path))
            if (earlier_part := self._parts.setdefault(name, part)) != part:
                first, second = sorted((earlier_part, part), key=list(Part).index)
                raise DataError(
                    f"{table.format_position(line)}: {name} is listed for {_PART_NAMES[first]} and for "
                    f"{_PART_NAMES[second]}; remove one of the rows"
                )
            raw_labels = parse_labels(table, roles, line, fields)
            self._raw_labels.update(raw_labels)
            self._labels.setdefault(name, set()).update(filter(None, map(clean_label, raw_labels)))

    def list_files(self) -> tuple[File, ...]:
        """Return the images in the order of their names.

        Raises `DataError`.
        """
        files = tuple(
            File(name, tuple(sorted(self._labels[name])), self._parts[name]) for name in sorted(self._labels)
        )
        unlabelled_names = [file.name for file in files if not file.labels]
        if unlabelled_names and all(len(file.labels) <= 1 for file in files):
            raise DataError(
                f"{self.display_path} gives no label for {_format_images(unlabelled_names)}; fill in the "
                "labels, or remove the rows; rows without labels are allowed only if some image has "
                "several labels"
            )
        if self._path_lookup.ambiguous_paths:
            name, matches = next(iter(self._path_lookup.ambiguous_paths.items()))
            images = _format_images(list(self._path_lookup.ambiguous_paths))
            raise DataError(
                f"{self.display_path} names {images} that match several files: "
                f"{name} matches {join_names(matches)}; write the whole path"
            )
        if self._missing_paths:
            missing_paths = list(dict.fromkeys(self._missing_paths))
            raise DataError(
                f"{self.display_path} names {_format_images(missing_paths)} that do not exist; "
                f"paths are relative to {self.root.absolute()}"
            )
        return files

    def describe_decisions(self) -> list[str]:
        """Return notes on surprising decisions."""
        notes = describe_spellings(self._raw_labels - {""})
        if completed_paths := self._path_lookup.completed_paths:
            path, name = next(iter(completed_paths.items()))
            notes.append(f"{format_count(len(completed_paths), 'path')} completed: {path} is {name}")
        return notes


class _PathLookup:
    """A lookup of the files that the paths in a table refer to.

    A path is used as written if the file exists. Otherwise the lookup ignores case, accepts `\\` for `/`, a
    missing suffix and missing parent folders, and uses the existing end of another machine's absolute path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.completed_paths: dict[str, str] = {}
        self.ambiguous_paths: dict[str, list[str]] = {}

    def find_file(self, path: str, base: str, part: Part) -> str | None:
        """Return the file's name below the root, or its absolute path; None if there is no such file."""
        name = str(PurePosixPath(base, path))
        if _is_file(self.root / name):
            return name
        if (file_name := self._search_endings(path, part)) is not None:
            self.completed_paths[path] = file_name
        return file_name

    def _search_endings(self, path: str, part: Part) -> str | None:
        folders = [one for one in path.replace("\\", "/").split("/") if one not in ("", ".")]
        is_foreign = path.startswith(("/", "\\", "..")) or path[1:2] == ":"
        for start in range(len(folders)):
            if start and not is_foreign and folders[:start] != [self.root.absolute().name]:
                return None
            matches = self._names_by_ending.get(_normalize_path("/".join(folders[start:])), [])
            if len(matches) > 1:
                matches = [
                    name for name in matches if part in map(parse_part, name.split("/")[:-1])
                ] or matches
            if len(matches) == 1:
                return matches[0]
            if matches:
                self.ambiguous_paths[path] = matches
                return matches[0]
        return None

    @cached_property
    def _names_by_ending(self) -> dict[str, list[str]]:
        """Map of every end of every path to the files; images also without their suffix."""
        endings: dict[str, list[str]] = {}
        for name in Folder(self.root).names:
            variants = [name, name.rpartition(".")[0]] if has_image_suffix(name) else [name]
            for path in variants:
                folders = path.split("/")
                for start in range(len(folders)):
                    endings.setdefault(_normalize_path("/".join(folders[start:])), []).append(name)
        return endings


def _normalize_path(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _describe_column(table: ParsedTable, roles: ColumnRoles) -> str:
    if roles.label_column is not None:
        return f"the column {table.columns[roles.label_column]!r}"
    return f"the columns {join_names(map(repr, roles.label_flags.values()))}"


def _collect_part_names(
    table: ParsedTable, roles: ColumnRoles, own_part: Part | None
) -> dict[Part, set[str]]:
    """Return the values or names by which the rows name each part; empty if no row names a part."""
    names: dict[Part, set[str]] = {}
    if own_part:
        names[own_part] = {table.path.name}
    for column, part in roles.part_flags.items():
        names.setdefault(part, set()).add(table.columns[column])
    if roles.split_column is not None:
        for value in {fields[roles.split_column] for _, fields in table.rows} - {""}:
            if named_part := parse_part(value):
                names.setdefault(named_part, set()).add(f"{table.columns[roles.split_column]}={value}")
    return names


def _find_other_images(root: Path, names: set[str]) -> Iterable[tuple[str, str]]:
    """Yield the unnamed images in the folders of the named images, each with its folder."""
    for folder in sorted({str(PurePosixPath(name).parent) for name in names}):
        prefix = "" if folder == "." else f"{folder}/"
        try:
            with os.scandir(root / folder) as entries:
                others = sorted(entry.name for entry in entries if entry.is_file())
        except OSError:  # reported when the images are read
            continue
        for other in others:
            name = prefix + other
            if name in names or find_clutter(other):
                continue
            if has_image_suffix(other) or not explain_file_rejection(root / name):
                yield name, prefix or "the same folder"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for a file
        return False


def _format_images(names: Sequence[str]) -> str:
    """Format the number of images and the first few names."""
    return f"{len(names)} images ({join_names(names, _MAX_NAMES)})"
