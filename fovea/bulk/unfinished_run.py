"""The folder of a run that is not finished: its manifest, and the parts of the table that are complete.

    .NAME.parts/manifest.json    the sources and options, to which every part belongs
    .NAME.parts/00000.parquet    the rows of the first `part_size` entries, renamed into place when complete
    .NAME.parts/00000.json       the record of the part, written after it: no part counts without a record

Each part belongs to a range of positions in the list of entries, and parts are written in order. A resumed
run lists the entries again, compares the names of those in finished parts with the records, and goes on with
the next part.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from fovea.bulk.engine import ClassifiedChunk
from fovea.bulk.rows import Row
from fovea.bulk.run_options import RunOptions, describe_difference
from fovea.bulk.table_facts import find_facts_file
from fovea.bulk.tables.table_format import RowWriter, TableFormat
from fovea.errors import FoveaError, StartError
from fovea.service.atomic_files import WriteError, replace_file, write_file
from fovea.service.errors import to_one_line

_MANIFEST: Final = "manifest.json"


@dataclass
class Counts:
    """Numbers of entries by outcome."""

    images: int = 0
    """Entries with a row, before `--where` selects."""
    errors: int = 0
    """Rows with an error among `images`."""
    skipped: int = 0
    """Files that are no images."""
    selected: int = 0
    """Rows in the table."""

    def add(self, other: Counts) -> None:
        """Add the numbers of other entries."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.images + self.skipped


@dataclass
class PartRecord:
    """What is known about a finished part."""

    names: str
    """Digest of the names of its entries."""
    counts: Counts = field(default_factory=Counts)


class UnfinishedRun:
    """The folder of a run that is not finished. Use as a context: it holds a lock meanwhile."""

    def __init__(self, out: Path, table_format: TableFormat) -> None:
        """Create the object for the run that writes `out`; no file is touched."""
        self.folder = find_parts_folder(out)
        self._out, self._format = out, table_format
        self.records: list[PartRecord] = []
        """Records of the finished parts."""

    def exists(self) -> bool:
        """Return whether there is such a run."""
        return (self.folder / _MANIFEST).exists()

    @contextmanager
    def open(self, options: RunOptions, *, resume: bool) -> Iterator[None]:
        """Begin the run, or continue it with `resume` if it exists, and hold the folder's lock meanwhile.

        Raises `StartError` if the run has other options, or goes on in another process, and `WriteError`.
        """
        with _name_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _lock_folder(self.folder, self._out):
            manifest = options.to_metadata()
            if resume and self.exists():
                self._check_manifest(manifest)
                self.records = self._read_records()
            else:
                with _name_write_errors(self.folder):
                    _empty_folder(self.folder)
                write_file(self.folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            yield

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        try:
            previous = json.loads((self.folder / _MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read {self.folder / _MANIFEST}: {to_one_line(error)}") from None
        if not isinstance(previous, dict) or not manifest.keys() <= previous.keys():
            raise StartError(f"{self.folder} is of another version of Fovea; begin anew with --force")
        if difference := describe_difference(previous, manifest, manifest):
            raise StartError(
                f"the unfinished run for {self._out} had other options: {difference}; repeat its options, or "
                "begin anew with --force"
            )

    def _read_records(self) -> list[PartRecord]:
        records: list[PartRecord] = []
        while (path := self._find_part(len(records)).with_suffix(".json")).exists():
            try:
                values = json.loads(path.read_bytes())
                records.append(PartRecord(values["names"], Counts(**values["counts"])))
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise StartError(
                    f"cannot read {path}: {to_one_line(error)}; begin anew with --force"
                ) from None
        return records

    def check_names(self, names_by_part: Iterable[Sequence[str]]) -> None:
        """Raise `StartError` unless these are the names of the entries in all finished parts."""
        digests = [compute_names_digest(names) for names in names_by_part]
        if digests != [record.names for record in self.records]:
            raise StartError(
                f"the sources have changed since the unfinished run for {self._out}: they have other images "
                "or another order; begin anew with --force"
            )

    def open_part(self) -> OpenPart:
        """Return the next part, to be used as a context."""
        return OpenPart(self._find_part(len(self.records)), self._format, self.records)

    def finish(self, options: RunOptions) -> None:
        """Join all parts into the table with the options as its metadata, and remove the folder.

        Raises `WriteError`.
        """
        metadata = options.to_metadata()
        parts = [self._find_part(index) for index in range(len(self.records))]
        with _name_write_errors(self._out), replace_file(self._out) as partial:
            self._format.join_parts(parts, partial, metadata)
        if not self._format.has_facts():
            write_file(find_facts_file(self._out), json.dumps(metadata, indent=1) + "\n")
        self.remove()

    def remove(self) -> None:
        """Remove the folder. The manifest is removed first: without it the rest counts not."""
        with suppress(OSError):
            (self.folder / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _find_part(self, index: int) -> Path:
        return self.folder / f"{index:05d}{self._format.suffix}"


class OpenPart:
    """A part that is being written. Leaving the context renames the file into place and records it."""

    def __init__(self, path: Path, table_format: TableFormat, records: list[PartRecord]) -> None:
        """Create the part; its record is appended to `records` when it is complete."""
        self._path, self._format, self._records = path, table_format, records
        self._stack = ExitStack()
        self._writer: RowWriter
        self._names = hashlib.sha256()
        self.counts = Counts()

    def __enter__(self) -> OpenPart:
        """Open a file beside the part's. Raises `WriteError`."""
        with _name_write_errors(self._path), ExitStack() as stack:
            partial = stack.enter_context(replace_file(self._path))
            self._writer = stack.enter_context(self._format.open_part(partial))
            self._stack = stack.pop_all()
        return self

    def add(self, chunk: ClassifiedChunk, rows: Sequence[Row], counts: Counts) -> None:
        """Add a chunk, of which `rows` are selected. Raises `WriteError`."""
        _update_digest(self._names, chunk.names)
        self.counts.add(counts)
        with _name_write_errors(self._path):
            self._writer.write_rows(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the part, or remove its file after an error. Raises `WriteError`."""
        if error is not None:
            with suppress(OSError):  # a full disk is full again when the file is closed
                self._stack.__exit__(kind, error, trace)
            return
        with _name_write_errors(self._path):
            self._stack.close()
        record = PartRecord(self._names.hexdigest(), self.counts)
        write_file(self._path.with_suffix(".json"), json.dumps(asdict(record)) + "\n")
        self._records.append(record)


def find_parts_folder(out: Path) -> Path:
    """Return the folder of the run that writes `out`. It is hidden, so that no run takes it for a source."""
    return out.with_name(f".{out.name}.parts")


def compute_names_digest(names: Iterable[str]) -> str:
    """Return a digest of names in their order."""
    digest = hashlib.sha256()
    _update_digest(digest, names)
    return digest.hexdigest()


def _update_digest(digest: Any, names: Iterable[str]) -> None:
    for name in names:
        digest.update(name.encode(errors="surrogatepass") + b"\0")


@contextmanager
def _lock_folder(folder: Path, out: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the kernel releases however the process ends. Raises `StartError`."""
    with _name_write_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another run is writing {out}; wait for its end") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _empty_folder(folder: Path) -> None:
    """Remove the files of an earlier run, the manifest first."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.unlink()


@contextmanager
def _name_write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `WriteError` that names the path."""
    try:
        yield
    except FoveaError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else to_one_line(error)
        raise WriteError(f"cannot write {path}: {reason}") from None
