"""Labelled images in a CSV file with the columns `path`, `label` and, where wanted, `split`.

Paths are relative to the file. Several labels of one image stand in one field, between `;` or `|`, or in
several rows; then the set is multi-label, and an empty label means that none is true.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

from model.examples import DataError
from model.sources import File, OnDisk

SUFFIXES: Final = frozenset({".csv", ".tsv"})
_DELIMITERS: Final = ",;\t"
_COLUMNS: Final = ("path", "label")
_SPLITS: Final = {
    **dict.fromkeys(("", "train", "val", "valid", "validation"), False),
    "test": True,
}
"""Is the image kept for the test? What is held out of the others, the seed decides."""
_SHOWN: Final = 5


class Table(OnDisk):
    """The images that a CSV file names."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.path = path

    @property
    def name(self) -> str:
        """The file's own."""
        return self.path.name

    @cached_property
    def _files(self) -> tuple[File, ...]:
        labels: dict[str, set[str]] = {}
        tests: dict[str, bool] = {}
        for line, row in self._rows():
            name = str(PurePosixPath(row["path"]))
            test = self._is_test(line, row.get("split", ""))
            if tests.setdefault(name, test) != test:
                raise DataError(f"{self.path}, line {line}: {name} is named for training and for the test")
            told = {label for part in re.split("[;|]", row["label"]) if (label := part.strip())}
            labels.setdefault(name, set()).update(told)
        files = tuple(File(name, tuple(sorted(labels[name])), tests[name]) for name in sorted(labels))
        self._require_labels(files)
        self._require_there(files)
        return files

    def files(self) -> tuple[File, ...]:
        """The images in the order of their names. Raises `DataError`."""
        return self._files

    def _is_test(self, line: int, split: str) -> bool:
        try:
            return _SPLITS[split.lower()]
        except KeyError:
            known = ", ".join(filter(None, _SPLITS))
            raise DataError(f"{self.path}, line {line}: the split is {split!r}; known are {known}") from None

    def _require_labels(self, files: Sequence[File]) -> None:
        without = [file.name for file in files if not file.labels]
        if without and all(len(file.labels) <= 1 for file in files):
            raise DataError(
                f"{self.path} gives no label for {_some(without)}; only in a multi-label set, in which "
                "some image has several, does that mean none of them: fill them in or take them out"
            )

    def _require_there(self, files: Sequence[File]) -> None:
        missing = [file.name for file in files if not _is_file(self.root / file.name)]
        if missing:
            raise DataError(
                f"{self.path} names {_some(missing)} that are not there; "
                f"paths are relative to {self.root.absolute()}"
            )

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Each row by its columns, with its line's number. Raises `DataError`."""
        text = self._text()
        delimiter, columns = self._header(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if reader.line_num == 1 or not any(field.strip() for field in row):
                    continue
                if len(row) != len(columns):
                    raise DataError(
                        f"{self.path}, line {reader.line_num}: {len(row)} fields, {len(columns)} columns; "
                        "put a field with a delimiter in it in quotes"
                    )
                fields = dict(zip(columns, (field.strip() for field in row), strict=True))
                if not fields["path"]:
                    raise DataError(f"{self.path}, line {reader.line_num}: the path is empty")
                yield reader.line_num, fields
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: {error}; save it as CSV again") from None

    def _text(self) -> str:
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self.path}, line {line}: this is not UTF-8; save it as CSV in UTF-8") from None
        if "\0" in text:
            raise DataError(f"{self.path} has zero bytes in it; save it as CSV in UTF-8")
        return text

    def _header(self, text: str) -> tuple[str, list[str]]:
        """The delimiter that makes the wanted columns of the first line, and all columns."""
        first = next(iter(text.splitlines()), "")
        for delimiter in _DELIMITERS:
            with suppress(csv.Error):
                columns = [
                    field.strip().lower() for field in next(csv.reader([first], delimiter=delimiter), [])
                ]
                if all(columns.count(wanted) == 1 for wanted in _COLUMNS):
                    return delimiter, columns
        raise DataError(
            f"{self.path} needs a first line with the columns path and label; it has {first[:80]!r}"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long to be one
        return False


def _some(names: Sequence[str]) -> str:
    """The number of images, and the first few."""
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names)} images ({', '.join(names[:_SHOWN])}{more})"
