"""Images in object stores: files, folders and patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fovea.bulk.inputs.basic_entries import FailedEntry, is_hidden_member, to_text
from fovea.bulk.inputs.patterns import PathPattern
from fovea.bulk.inputs.source_files import connect_store
from fovea.service.errors import FileError
from fovea.service.image_files import ImageEntry, check_image_size
from fovea.service.remote.store_uri import StoreError


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """An image in an object store."""

    root: str
    """URI of a bucket or a folder, whose connection all of its entries share in a process."""
    path: str
    """Path below the root; empty for the root itself."""
    size: int | None = None
    """Size in bytes, if the store has listed the file."""
    is_named: bool = False

    @property
    def name(self) -> str:
        """The URI."""
        return to_text(f"{self.root}/{self.path}" if self.path else self.root)

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError` and `BodyTooLarge`."""
        if self.size is not None:
            check_image_size(self.size, max_bytes, "the file")
        try:
            store = connect_store(self.root)
            if not self.size:  # of unknown size, or empty, of which no range can be asked for
                return store.read_file(self.path, max_bytes)
            content = store.read_range(self.path, 0, max_bytes + 1)
        except StoreError as error:
            raise FileError(str(error)) from None
        check_image_size(len(content), max_bytes, "the file")
        return content


def list_store(uri: str, pattern: PathPattern | None = None) -> Iterator[ImageEntry]:
    """Yield the images below a URI, or the image at the URI; without clutter.

    With a pattern, only those that match below the pattern's folder, which is then the URI. A failure of the
    store becomes one entry with the error, behind the images that were listed before.
    """
    try:
        for stored in connect_store(uri).walk_files():
            if not stored.path:
                yield StoreEntry(uri, "", stored.size, is_named=True)
            elif not is_hidden_member(stored.path) and (
                pattern is None or pattern.matches(stored.path.split("/"))
            ):
                yield StoreEntry(uri, stored.path, stored.size)
    except StoreError as error:
        yield FailedEntry(to_text(uri), str(error))


def create_store_entry(uri: str) -> StoreEntry:
    """Return the entry of one image that the user names by its URI.

    The entries of a bucket share its connection. Stores without buckets share those of their folders.
    """
    scheme, _, place = uri.partition("://")
    place = place.rstrip("/")
    folder, _, path = place.rpartition("/") if scheme.lower() in ("file", "memory") else place.partition("/")
    return (
        StoreEntry(f"{scheme}://{folder}", path, is_named=True)
        if folder and path
        else StoreEntry(f"{scheme}://{place}", "", is_named=True)
    )
