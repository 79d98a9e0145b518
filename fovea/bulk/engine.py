"""What classifies the images of a run: a model in this process, or workers elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol

from fovea.bulk.rows import Row
from fovea.bulk.table_facts import TableFacts
from fovea.errors import FileError, RequestError, UnsupportedFormat
from fovea.service.artifact.contract import Contract
from fovea.service.image_files import ImageEntry
from fovea.service.inference.image_suffixes import has_image_suffix


class ClassifiedChunk(NamedTuple):
    """The rows of consecutive entries."""

    names: Sequence[str]
    """Names of the entries."""
    rows: Sequence[Row | None]
    """Row of each entry; None for a file that is no image and was not named by the user."""


class Engine(Protocol):
    """Classifies entries in bounded memory. The rows depend on the entries and their positions only.

    So a run that was interrupted and resumed has the same rows as a run in one go.
    """

    @property
    def facts(self) -> TableFacts:
        """The model and the options of its answers."""

    @property
    def contract(self) -> Contract:
        """Contract of the model: its labels, task and thresholds."""

    @property
    def description(self) -> str:
        """What else the rows depend on, to the last bit: execution provider, threads, batch size."""

    @property
    def chunk_size(self) -> int:
        """Number of entries in a chunk. Chunks are cut by position, so that batches are always the same."""

    def classify(self, chunks: Iterator[Sequence[ImageEntry]]) -> Generator[ClassifiedChunk, None, None]:
        """Yield the rows of each chunk, in order. Closing the generator ends the work.

        All chunks but the last have `chunk_size` entries. Raises `FoveaError` if the run cannot go on.
        """


def is_skipped(name: str, is_named: bool, error: RequestError | FileError) -> bool:
    """Return whether an entry is left out of the table: a file in a folder or archive that is no image."""
    return isinstance(error, UnsupportedFormat) and not is_named and not has_image_suffix(name)
