"""Classification of one chunk of entries with a model in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from fovea.bulk.engine import ClassifiedChunk, is_skipped
from fovea.bulk.row_maker import RowMaker
from fovea.bulk.rows import Row
from fovea.service.errors import FileError, RequestError
from fovea.service.image_files import ImageEntry
from fovea.service.runners.batch_messages import BoxAnswers
from fovea.service.runners.predictor import Predictor


class ChunkClassifier:
    """Reads, decodes and classifies chunks. Several threads may use it at once.

    No call is `exclusive`: which calls run alone depends on the moment, and the number of threads in a call
    changes the last bits of its result.
    """

    def __init__(self, predictor: Predictor, row_maker: RowMaker, max_bytes: int) -> None:
        """Create the classifier. Images have at most `max_bytes` bytes."""
        self._predictor, self._row_maker, self._max_bytes = predictor, row_maker, max_bytes

    def classify(self, entries: Iterable[ImageEntry]) -> ClassifiedChunk:
        """Return the rows of a chunk. Raises `ModelError` if the graph does not run.

        Each entry is taken when the image before it is decoded, and is not kept: it may hold its image.
        """
        names: list[str] = []
        rows: list[Row | None] = []
        iterator = iter(entries)
        while self._classify_batch(islice(iterator, self._predictor.loaded_model.batch_max), names, rows):
            pass
        return ClassifiedChunk(names, rows)

    def _classify_batch(self, entries: Iterator[ImageEntry], names: list[str], rows: list[Row | None]) -> int:
        """Append names and rows, and return their number."""
        outcomes: list[tuple[str, bool, RequestError | FileError | None]] = []

        def read_all() -> Iterator[bytes]:
            for entry in entries:
                name, is_named = entry.name, entry.is_named
                try:
                    content = entry.read(self._max_bytes)
                except (RequestError, FileError) as error:
                    # without its frames, which would keep the content alive
                    outcomes.append((name, is_named, error.with_traceback(None)))
                    continue
                outcomes.append((name, is_named, None))
                del entry
                yield content
                del content  # before the next one is read

        answers = iter(self._predictor.predict_stream(read_all()).answers)
        for name, is_named, read_error in outcomes:
            outcome = next(answers) if read_error is None else read_error
            if isinstance(outcome, BoxAnswers):
                raise TypeError(f"{name} was asked for without boxes")
            names.append(name)
            if isinstance(outcome, RequestError | FileError) and is_skipped(name, is_named, outcome):
                rows.append(None)
            else:
                rows.append(self._row_maker.create_row(name, outcome))
        return len(outcomes)
