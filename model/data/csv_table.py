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
from fovea.model.data.clutter import clutter_in
from fovea.model.data.columns import Meaning, meaning_of, rate_columns, true_labels
from fovea.model.data.examples import DataError
from fovea.model.data.formats import has_image_suffix
from fovea.model.data.inventory import File, Inventory, Part, count, group_left_out, printable, some
from fovea.model.data.labels import clean_label, spellings
from fovea.model.data.parts import part_of
from fovea.model.data.rows import SUFFIXES, Rows, read_rows
from fovea.model.data.sources import Folder, OnDisk, Survey, refusal_at

_SHOWN: Final = 5

_WORDS: Final = {Part.TRAIN: "training", Part.VALIDATION: "validation", Part.TEST: "the test"}


def is_table(name: str) -> bool:
    """Return whether the file has a table's suffix."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


class Table(OnDisk):
    """The images that one or several CSV files in a folder name."""

    def __init__(self, *paths: Path, choices: Choices | None = None, root: Path | None = None) -> None:
        """Create the source.

        `root` is a folder that contains the files, directly or below; the default is the folder of the first
        file.
        """
        super().__init__(root or paths[0].parent)
        self.paths_of_tables = paths
        self.choices = choices or Choices()

    @property
    def name(self) -> str:
        """The file's name, or the folder's name if there are several files."""
        if len(self.paths_of_tables) == 1:
            return printable(self.paths_of_tables[0].name)
        return printable(self.root.absolute().name)

    @cached_property
    def survey(self) -> Survey:
        """The named images, and the images beside them that are not named.

        Raises `DataError`.
        """
        entries = _Entries(self.root, self._path_shown)
        columns: dict[str, None] = {}
        notes: list[str] = []
        parts: dict[Part, set[str]] = {}
        in_order = sorted(
            self.paths_of_tables, key=lambda path: list(Part).index(self._own_part(path) or Part.TRAIN)
        )
        for path in in_order:
            try:
                table = read_rows(path, lambda found: rate_columns(found, self.choices))
                meaning = meaning_of(table, self.choices)
                if columns and _column(table, meaning) not in columns:
                    raise DataError(f"its labels would be in {_column(table, meaning)}")
            except DataError as error:
                if self._own_part(path) is not Part.TEST:
                    raise
                notes.append(f"{path.name} is not used: {error}")  # a contest, whose labels are secret
                continue
            entries.add(table, meaning, self._own_part(path))
            columns |= {_column(table, meaning): None}
            notes += [*table.notes, *meaning.notes]
            for part, names in _names_of_parts(table, meaning, self._own_part(path)).items():
                parts.setdefault(part, set()).update(names)
        files = entries.files()
        beside = _beside(self.root, {file.name for file in files})
        left_out = {name: (f"in {folder}", f"{self.name} does not name them") for name, folder in beside}
        inventory = Inventory(
            len(files) + len(left_out),
            {part: tuple(sorted(parts[part])) for part in Part if part in parts},
            f"in {', '.join(columns)}",
            group_left_out(left_out),
            tuple(map(printable, (*notes, *entries.notes()))),
        )
        return Survey(files, inventory)

    @property
    def _path_shown(self) -> str:
        return str(self.paths_of_tables[0] if len(self.paths_of_tables) == 1 else self.root)

    def _own_part(self, path: Path) -> Part | None:
        """Return the part that a file's name or folder states, if there are several files."""
        if len(self.paths_of_tables) == 1:
            return None
        return part_of(path.stem) or part_of(path.parent.name)


class _Entries:
    """The images that the rows name, with their labels and parts."""

    def __init__(self, root: Path, shown: str) -> None:
        self.root, self.shown = root, shown
        self._places = _Places(root)
        self._labels: dict[str, set[str]] = {}
        self._parts: dict[str, Part] = {}
        self._written: set[str] = set()
        self._missing: list[str] = []
        self._flags = False

    def add(self, table: Rows, meaning: Meaning, own_part: Part | None) -> None:
        """Add the rows of a table.

        Raises `DataError`.
        """
        base = table.path.parent.relative_to(self.root).as_posix()
        for line, fields in table.rows:
            path = fields[meaning.path]
            if not path:
                raise DataError(f"{table.where(line)}: the path is empty")
            try:
                part = meaning.part(fields) or own_part or Part.TRAIN
            except KeyError as error:
                raise DataError(
                    f"{table.where(line)}: the split is {error.args[0]!r}; known are train, val, validation, "
                    "dev, test, eval and other words for these"
                ) from None
            name = self._places.find(path, base, part)
            if name is None:
                self._missing.append(str(PurePosixPath(path)))
                name = str(PurePosixPath(path))
            if (earlier := self._parts.setdefault(name, part)) != part:
                first, second = sorted((earlier, part), key=list(Part).index)
                raise DataError(
                    f"{table.where(line)}: {name} is named for {_WORDS[first]} and for {_WORDS[second]}"
                )
            written = true_labels(table, meaning, line, fields)
            self._written.update(written)
            self._labels.setdefault(name, set()).update(filter(None, map(clean_label, written)))

    def files(self) -> tuple[File, ...]:
        """Return the images in the order of their names.

        Raises `DataError`.
        """
        files = tuple(
            File(name, tuple(sorted(self._labels[name])), self._parts[name]) for name in sorted(self._labels)
        )
        without = [file.name for file in files if not file.labels]
        if without and all(len(file.labels) <= 1 for file in files):
            raise DataError(
                f"{self.shown} gives no label for {_some(without)}; only in a multi-label set, in which "
                "some image has several, does that mean none of them: fill them in or take them out"
            )
        if self._places.ambiguous:
            name, found = next(iter(self._places.ambiguous.items()))
            raise DataError(
                f"{self.shown} names {_some(list(self._places.ambiguous))} that lie in several places: "
                f"{name} is {some(found)}; write the whole path"
            )
        if self._missing:
            missing = list(dict.fromkeys(self._missing))
            raise DataError(
                f"{self.shown} names {_some(missing)} that are not there; "
                f"paths are relative to {self.root.absolute()}"
            )
        return files

    def notes(self) -> list[str]:
        """Return notes on surprising decisions."""
        notes = spellings(self._written - {""})
        if completed := self._places.completed:
            path, name = next(iter(completed.items()))
            notes.append(f"{count(len(completed), 'path')} completed: {path} is {name}")
        return notes


class _Places:
    """A lookup of the files that the paths in a table refer to.

    A path is used as written if the file exists. Otherwise the lookup ignores case, accepts `\\` for `/`, a
    missing suffix and missing parent folders, and uses the existing end of another machine's absolute path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.completed: dict[str, str] = {}
        self.ambiguous: dict[str, list[str]] = {}

    def find(self, path: str, base: str, part: Part) -> str | None:
        """Return the file's name below the root, or its absolute path; None if there is no such file."""
        name = str(PurePosixPath(base, path))
        if _is_file(self.root / name):
            return name
        if (found := self._find(path, part)) is not None:
            self.completed[path] = found
        return found

    def _find(self, path: str, part: Part) -> str | None:
        folders = [one for one in path.replace("\\", "/").split("/") if one not in ("", ".")]
        is_foreign = path.startswith(("/", "\\", "..")) or path[1:2] == ":"
        for start in range(len(folders)):
            if start and not is_foreign and folders[:start] != [self.root.absolute().name]:
                return None
            found = self._endings.get(_plain("/".join(folders[start:])), [])
            if len(found) > 1:
                found = [name for name in found if part in map(part_of, name.split("/")[:-1])] or found
            if len(found) == 1:
                return found[0]
            if found:
                self.ambiguous[path] = found
                return found[0]
        return None

    @cached_property
    def _endings(self) -> dict[str, list[str]]:
        """Map of every end of every path to the files; images also without their suffix."""
        endings: dict[str, list[str]] = {}
        for name in Folder(self.root).names:
            own = [name, name.rpartition(".")[0]] if has_image_suffix(name) else [name]
            for path in own:
                folders = path.split("/")
                for start in range(len(folders)):
                    endings.setdefault(_plain("/".join(folders[start:])), []).append(name)
        return endings


def _plain(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _column(table: Rows, meaning: Meaning) -> str:
    if meaning.label is not None:
        return f"the column {table.columns[meaning.label]!r}"
    return f"the columns {some(map(repr, meaning.flags.values()))}"


def _names_of_parts(table: Rows, meaning: Meaning, own_part: Part | None) -> dict[Part, set[str]]:
    """Return the values or names by which the rows name each part; empty if no row names a part."""
    names: dict[Part, set[str]] = {}
    if own_part:
        names[own_part] = {table.path.name}
    for place, part in meaning.is_part.items():
        names.setdefault(part, set()).add(table.columns[place])
    if meaning.split is not None:
        for value in {fields[meaning.split] for _, fields in table.rows} - {""}:
            if part_named := part_of(value):
                names.setdefault(part_named, set()).add(f"{table.columns[meaning.split]}={value}")
    return names


def _beside(root: Path, names: set[str]) -> Iterable[tuple[str, str]]:
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
            if name in names or clutter_in(other):
                continue
            if has_image_suffix(other) or not refusal_at(root / name):
                yield name, prefix or "the same folder"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for a file
        return False


def _some(names: Sequence[str]) -> str:
    """Format the number of images and the first few names."""
    return f"{len(names)} images ({some(names, _SHOWN)})"
