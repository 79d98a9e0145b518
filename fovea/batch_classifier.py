"""Classification of the batches of other engines: Ray Data, Spark, Dask, pandas.

    ds.map_batches(fovea.BatchClassifier("zoo/pets"))

An engine pickles the classifier, sends it to its processes, and calls it with a batch of rows in columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias, overload

from fovea.bulk.rows import Row, create_row
from fovea.errors import BadRequest, FileError, RequestError
from fovea.images import list_images, printable_name
from fovea.results import Result

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    from fovea.local import Model
    from fovea.service.providers import ProviderSetting

_Array: TypeAlias = "npt.NDArray[Any]"
_Outcome: TypeAlias = Result | RequestError | FileError

IMAGE_COLUMNS: Final = ("bytes", "path")
"""Columns in which images are looked for, the first that exists."""

SPARK_TYPES: Final = {
    "path": "string",
    "label": "string",
    "probability": "float",
    "labels": "array<string>",
    "probabilities": "array<float>",
    "label_set": "array<string>",
    "known": "boolean",
    "known_score": "float",
    "width": "int",
    "height": "int",
    "format": "string",
    "error": "string",
    "message": "string",
}
"""Type of each column of the answer, as Spark writes it. The columns are the fields of `Row`."""

_PANDAS_TYPES: Final = {"known": "boolean", "width": "Int32", "height": "Int32"}
"""Type in pandas of columns that may have nulls, which NumPy's booleans and integers cannot hold."""

_NULL_TYPES: Final = frozenset({"NoneType", "NAType", "NaTType"})
"""Names of the types of nulls; pandas has two."""


class BatchClassifier:
    """A classifier of batches, which are columns of equal length, for engines such as Ray Data and Spark.

    It is pickled as its source and options. Each process loads the model at its first batch and keeps it, so
    the source must exist where the batches are classified, such as a folder that all machines share. Calls
    may come from several threads at once.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        column: str | None = None,
        prefix: str = "",
        top_k: int = 5,
        coverage: float | None = None,
        provider: ProviderSetting | None = None,
        threads: int | None = 1,
    ) -> None:
        """Keep the options; nothing is loaded yet.

        `source` and `provider` are those of `fovea.load`, `top_k` and `coverage` those of `Model.classify`.
        `threads` is the number of processors that each process may use; None for all. Engines run one process
        for each processor, so the default is 1.

        `column` is the column of images; by default `bytes`, or `path` if there is no such column. Its values
        are paths, encoded images as bytes, arrays of pixels, PIL images, or dictionaries with `bytes` and
        `path`. `prefix` comes before the names of the columns of the answer, all but `path`, so that they
        differ from those of the batch.

        Raises `ValueError` for options that are out of range.
        """
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; it must be at least 0")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self._source = None if source is None else os.fspath(source)
        self._column, self._prefix = column, prefix
        self._top_k, self._coverage = top_k, coverage
        self._provider, self._threads = provider, threads

    @property
    def spark_schema(self) -> str:
        """The columns of the answer with their types, for Spark; put the batch's other columns before it."""
        return ", ".join(f"{self._name(field)} {SPARK_TYPES[field]}" for field in Row._fields)

    @overload
    def __call__(self, batch: Mapping[str, _Array | Sequence[Any]]) -> dict[str, _Array]: ...

    @overload
    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame: ...

    def __call__(self, batch: Any) -> Any:
        """Classify a batch: return its other columns, and the columns of the answer (`Row`) after them.

        A dictionary of arrays becomes a dictionary of arrays, a pandas frame becomes a frame with the same
        index. The column of images is left out. The column `path` is the batch's own or, if it has none, the
        paths of the images. An image that cannot be classified, also a null, becomes a row with an `error`
        and a `message`. In arrays, a missing probability or score is NaN, and any other missing value None.

        Raises `ModelError` if the model cannot be loaded, `BadRequest` for a `coverage` that the model does
        not have, and `ValueError` for a batch without a column of images, or with columns of the names of
        the answer's.
        """
        names = [str(name) for name in batch.keys()]  # noqa: SIM118 - a frame iterates over names, too
        column = self._find_image_column(names)
        others = [name for name in names if name not in (column, "path")]
        self._check_names(others)
        images = list(_iterate_values(batch[column]))
        paths = [_find_path(image) for image in images]
        if "path" in names and column != "path":
            paths = [None if _is_null(path) else str(path) for path in batch["path"]]
        answer = _create_arrays(self._classify(images, paths))
        renamed = {self._name(field): values for field, values in answer.items()}
        if hasattr(batch, "iloc"):
            return self._create_frame(batch[others], renamed)
        return {**{name: batch[name] for name in others}, **renamed}

    def map_in_pandas(self, frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """Classify each frame, for Spark's `mapInPandas`, whose schema ends with `spark_schema`."""
        for frame in frames:
            yield self(frame)

    def _name(self, field: str) -> str:
        """Return the name of a column of the answer."""
        return field if field == "path" else f"{self._prefix}{field}"

    def _find_image_column(self, names: Sequence[str]) -> str:
        candidates = IMAGE_COLUMNS if self._column is None else (self._column,)
        for name in candidates:
            if name in names:
                return name
        advice = "; name the column of images with column=" if self._column is None else ""
        raise ValueError(
            f"the batch has no column {' or '.join(candidates)}; its columns are "
            f"{', '.join(names) or 'none'}{advice}"
        )

    def _check_names(self, others: Sequence[str]) -> None:
        """Raise `ValueError` if a column of the batch has the name of a column of the answer."""
        answer_names = {self._name(field) for field in Row._fields}
        if taken := [name for name in others if name in answer_names]:
            raise ValueError(
                f"the batch has a column {taken[0]}, which is also a column of the answer; choose other "
                "names for the answer with prefix=, such as prefix='predicted_'"
            )

    def _classify(self, images: Sequence[Any], paths: Sequence[str | None]) -> list[Row]:
        """Return the rows of images in any form, in order."""
        outcomes: list[_Outcome | None] = []
        sources: list[Any] = []
        for image in images:
            try:
                sources.append(_to_source(image))
                outcomes.append(None)
            except (RequestError, FileError) as error:
                outcomes.append(error)
        answers: Iterator[_Outcome] = iter(())
        if sources:
            model = _load_model(self._source, self._provider, self._threads)
            answers = iter(
                model.classify(sources, top_k=self._top_k, coverage=self._coverage, on_error="return")
            )
        return [
            create_row(path, next(answers) if outcome is None else outcome)  # type: ignore[arg-type]
            for path, outcome in zip(paths, outcomes, strict=True)
        ]

    def _create_frame(self, others: pd.DataFrame, answer: Mapping[str, _Array]) -> pd.DataFrame:
        import pandas as pd

        frame = pd.DataFrame(answer, index=others.index)
        types = {self._name(field): kind for field, kind in _PANDAS_TYPES.items()}
        return pd.concat([others, frame.astype(types)], axis=1)

    def __repr__(self) -> str:
        """Return the source and the options."""
        return (
            f"BatchClassifier({self._source!r}, column={self._column!r}, prefix={self._prefix!r}, "
            f"top_k={self._top_k}, coverage={self._coverage}, provider={self._provider!r}, "
            f"threads={self._threads})"
        )


@cache
def _load_model(source: str | None, provider: ProviderSetting | None, threads: int | None) -> Model:
    """Return the model of this process, which keeps it: an engine may unpickle a classifier for each task."""
    from fovea.local import load

    return load(source, provider=provider, threads=threads)


def _iterate_values(column: Any) -> Iterator[Any]:
    """Yield the values of a column.

    NumPy cuts zeros from the end of bytes in an array of type `S`; they are put back, because they may belong
    to the image.
    """
    dtype = getattr(column, "dtype", None)
    if getattr(dtype, "kind", "") == "S":
        size: int = dtype.itemsize  # type: ignore[union-attr]
        return (bytes(value).ljust(size, b"\0") for value in column)
    return iter(column)


def _is_null(value: Any) -> bool:
    return type(value).__name__ in _NULL_TYPES or (_is_float(value) and math.isnan(value))


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or type(value).__name__ in ("float16", "float32")


def _find_path(image: Any) -> str | None:
    """Return the path of an image that is a path, or that a dictionary names."""
    value = image.get("path") if isinstance(image, Mapping) else image
    return printable_name(value) if isinstance(value, str | os.PathLike) else None


def _to_source(image: Any) -> Any:
    """Return the image as `Model.classify` takes it. Raises `FileError` for a null, else `BadRequest`."""
    if isinstance(image, Mapping):  # as in data sets of the Hugging Face hub
        values = [image.get(name) for name in IMAGE_COLUMNS]
        image = next((value for value in values if not _is_null(value)), None)
    if _is_null(image):
        raise FileError("there is no image: the value is null")
    try:
        _, is_single = list_images(image)
    except TypeError as error:
        raise BadRequest(str(error)) from None
    if not is_single:
        raise BadRequest(f"the value is a {type(image).__name__} of values; one image is expected")
    return image


def _create_arrays(rows: Sequence[Row]) -> dict[str, _Array]:
    """Return the columns of the rows as arrays."""
    import numpy as np

    columns: dict[str, _Array] = {}
    for index, (field, kind) in enumerate(SPARK_TYPES.items()):
        values = [row[index] for row in rows]
        if kind == "float":
            columns[field] = np.array([math.nan if value is None else value for value in values], np.float32)
            continue
        column: _Array = np.empty(len(rows), object)
        for position, value in enumerate(values):  # one by one: lists of equal length would become a matrix
            column[position] = list(value) if isinstance(value, tuple) else value
        columns[field] = column
    return columns
