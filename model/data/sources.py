"""Sources of labelled images: a folder or an archive with one sub-folder for each label.

`Source` is the interface of both; `model.data.csv_table` is a third kind. Hidden files and operating system
files are left out. Symbolic links are followed. Every file is counted: it is an image with a label, or it is
left out for a reason.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import posixpath
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, Protocol

from fovea.model.data.choices import Choices
from fovea.model.data.clutter import find_clutter
from fovea.model.data.examples import DataError
from fovea.model.data.folders import detect_layout
from fovea.model.data.formats import HEAD_BYTES, explain_rejection, has_image_suffix
from fovea.model.data.inventory import File, Inventory, Part, describe_kind, group_skipped_files, to_printable
from fovea.model.data.labels import clean_label, describe_spellings
from fovea.service.errors import BadImage

MAX_BYTES: Final = 512 << 20
"""Maximum size of an encoded image, in bytes.

No camera writes larger files, and a file is read into memory completely.
"""

_HIDDEN_REASON: Final = "hidden, or a system's own"


EncodedImage = Path | bytes | BadImage
"""Encoded image, its path, or the reason why it cannot be read."""


@dataclass(frozen=True)
class Survey:
    """The labelled images of a source, sorted by name, and the inventory of all files."""

    files: tuple[File, ...]
    inventory: Inventory


class Source(Protocol):
    """The interface of a source of labelled images in files."""

    @property
    def name(self) -> str:
        """Name for people."""

    @property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """

    def fingerprint(self) -> str:
        """Return a digest of sizes and times that changes when an image or a label changes."""

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index in `names` and the image, or its path, in the fastest order."""

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image as an open file at its beginning; the file is valid until the next image."""


@dataclass
class Listing:
    """The files of a source."""

    names: list[str] = field(default_factory=list)
    """Names of the files that are not hidden, images or not."""
    skipped_files: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(kind, reason) of the left-out files, by name."""

    def skip_file(self, name: str, reason: str, kind: str | None = None) -> None:
        """Count a file as left out."""
        self.skipped_files[name] = kind or describe_kind(name), reason


def label_by_folders(name: str, listing: Listing, choices: Choices) -> Survey:
    """Label the images of a listing by their folders.

    Raises `DataError`.
    """
    skipped_files = dict(listing.skipped_files)
    try:
        layout = detect_layout(
            (one for one in listing.names if one not in skipped_files), choices.label_depth
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    skipped_files |= layout.skipped_images
    files = []
    parts: dict[Part, set[str]] = {}
    for image, placement in sorted(layout.placements.items()):
        label = clean_label(placement.label)
        if not label:
            skipped_files[image] = f"in {placement.label!r}/", "the folder's name is blank, and so no label"
            continue
        files.append(File(image, (label,), placement.part))
        if placement.part_folder:
            parts.setdefault(placement.part, set()).add(to_printable(placement.part_folder))
    inventory = Inventory(
        len({*listing.names, *listing.skipped_files}),
        {part: tuple(sorted(parts[part])) for part in Part if part in parts},
        "the folders' names",
        group_skipped_files(skipped_files),
        (
            *map(to_printable, layout.notes),
            *describe_spellings(placement.label for placement in layout.placements.values()),
        ),
    )
    return Survey(tuple(files), inventory)


# --- on disk -------------------------------------------------------------------------------------


class DiskSource(ABC):
    """A source of images below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    @abstractmethod
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """

    def list_files(self) -> tuple[File, ...]:
        """Return the images, sorted by name.

        Raises `DataError`.
        """
        return self.survey.files

    def fingerprint(self) -> str:
        """Return a digest of all names, labels, sizes and modification times."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.list_files():
            try:
                state = (self.root / file.name).stat()
            except OSError:  # reported when the image is read
                continue
            digest.update(repr((file, state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()

    def resolve_paths(self, names: Iterable[str]) -> list[Path]:
        """Return the paths of the named images."""
        return [self.root / name for name in names]

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index and the path of each image."""
        yield from enumerate(self.resolve_paths(names))

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image that can be opened."""
        for path in self.resolve_paths(names):
            try:
                with path.open("rb") as file:
                    yield file
            except OSError:  # reported when the image is read
                continue


class Folder(DiskSource):
    """A folder with one sub-folder for each label."""

    def __init__(self, root: Path, choices: Choices | None = None) -> None:
        super().__init__(root)
        self.choices = choices or Choices()

    @property
    def name(self) -> str:
        """The folder's own name, even for the current folder."""
        return to_printable(self.root.absolute().name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files that are not hidden.

        Raises `DataError`.
        """
        return tuple(self._listing.names)

    @cached_property
    def _listing(self) -> Listing:
        listing = Listing()
        try:
            _walk_folder(self.root, "", frozenset(), listing)
        except OSError as error:
            raise DataError(f"cannot list {error.filename}: {error.strerror}") from None
        listing.names.sort()
        return listing

    @cached_property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """
        for name in self._listing.names:
            if not has_image_suffix(name) and (reason := explain_file_rejection(self.root / name)):
                self._listing.skip_file(name, reason)
        return label_by_folders(self.name, self._listing, self.choices)


def explain_file_rejection(path: Path) -> str | None:
    """Return why a file is not a supported image; None if it is one."""
    try:
        with path.open("rb") as file:
            return explain_rejection(file.read(HEAD_BYTES))
    except OSError as error:
        return error.strerror or "it cannot be opened"


def _walk_folder(folder: Path, prefix: str, parent_ids: frozenset[tuple[int, int]], listing: Listing) -> None:
    """List the files below a folder; a link back to a parent folder is not followed."""
    state = folder.stat()
    folder_id = (state.st_dev, state.st_ino)
    if folder_id in parent_ids:
        listing.skip_file(prefix.rstrip("/"), "a link to a folder above", "link")
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            kind = find_clutter(entry.name)
            if kind and entry.is_dir(follow_symlinks=False):
                _walk_clutter(Path(entry.path), name, f"in {entry.name}/", listing)
            elif kind:
                listing.skip_file(name, _HIDDEN_REASON, kind)
            elif entry.is_symlink() and not Path(entry.path).exists():
                listing.skip_file(name, "a link that leads nowhere", "link")
            elif entry.is_dir():
                _walk_folder(Path(entry.path), f"{name}/", parent_ids | {folder_id}, listing)
            elif entry.is_file():
                listing.names.append(name)
            else:
                listing.skip_file(name, "a device, a socket or a pipe")


def _walk_clutter(folder: Path, name: str, kind: str, listing: Listing) -> None:
    """Count the files below a system folder, as far as they can be listed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _walk_clutter(Path(entry.path), f"{name}/{entry.name}", kind, listing)
                else:
                    listing.skip_file(f"{name}/{entry.name}", _HIDDEN_REASON, kind)
    except OSError:  # for example lost+found, which only root can list
        listing.skip_file(name, f"{_HIDDEN_REASON}, and it cannot be listed", kind)


# --- in an archive -------------------------------------------------------------------------------


class Archive:
    """A tar archive, compressed or not, with one folder for each label."""

    def __init__(self, path: Path, choices: Choices | None = None) -> None:
        self.path, self.choices = path, choices or Choices()

    @property
    def name(self) -> str:
        """The archive's file name."""
        return to_printable(self.path.name)

    @cached_property
    def _members(self) -> tuple[dict[str, tarfile.TarInfo], Listing]:
        """Members that are not hidden, and the listing.

        Of two members with the same name, the later one counts, as in unpacking.
        """
        all_members: dict[str, tarfile.TarInfo] = {}
        rejections: dict[int, str | None] = {}
        with _open_tar(self.path) as archive:
            for member in archive:
                all_members[normalize_member_name(member.name)] = member
                if member.isreg() and not has_image_suffix(member.name):
                    file = archive.extractfile(member)
                    rejections[member.offset] = explain_rejection(file.read(HEAD_BYTES)) if file else None
            _require_end_block(archive)
        listing = Listing()
        members: dict[str, tarfile.TarInfo] = {}
        for name, member in all_members.items():
            target = _resolve_link(name, member, all_members)
            if target.isdir():
                if member.issym():
                    listing.skip_file(name, "a link to a folder is not followed in an archive", "link")
                continue
            if skip_member(name, target.size, listing):
                continue
            if not target.isfile():
                if target.issym() or target.islnk():
                    listing.skip_file(name, "a link to nothing in the archive", "link")
                else:
                    listing.skip_file(name, "a device or a pipe")
                continue
            members[name] = target
            listing.names.append(name)
            if not has_image_suffix(name) and (reason := rejections.get(target.offset)):
                listing.skip_file(name, reason)
        listing.names.sort()
        return members, listing

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files that are not hidden.

        Raises `DataError`.
        """
        return tuple(self.listing.names)

    @property
    def listing(self) -> Listing:
        """The listing of all files.

        Raises `DataError`.
        """
        return self._members[1]

    @cached_property
    def survey(self) -> Survey:
        """The labelled images and the inventory.

        Raises `DataError`.
        """
        return label_by_folders(self.name, self.listing, self.choices)

    def list_files(self) -> tuple[File, ...]:
        """Return the images, sorted by name.

        Raises `DataError`.
        """
        return self.survey.files

    def fingerprint(self) -> str:
        """Return a fingerprint of the archive's size and modification time."""
        state = self.path.stat()
        return f"{state.st_size}-{state.st_mtime_ns}"

    def read_contents(self, names: Sequence[str]) -> Iterator[tuple[int, EncodedImage]]:
        """Yield the index and the content of each image, in archive order."""
        for index, file in self._open_members(names):
            yield index, file.read()

    def open_heads(self, names: Sequence[str]) -> Iterator[IO[bytes]]:
        """Yield each image as an open file."""
        for _, file in self._open_members(names):
            yield file

    def _open_members(self, names: Sequence[str]) -> Iterator[tuple[int, IO[bytes]]]:
        members_by_name = self._members[0]
        members = sorted(
            ((members_by_name[name], index) for index, name in enumerate(names)), key=_get_offset
        )
        with _open_tar(self.path) as archive:
            for member, index in members:
                file = archive.extractfile(member)
                if file:
                    yield index, file


def normalize_member_name(name: str) -> str:
    """Return a member's normalised path, without `.`, `//` and a leading `/`."""
    return posixpath.normpath(name.lstrip("/"))


def skip_member(name: str, size: int, listing: Listing) -> bool:
    """Leave out a member that is hidden, leads out of the archive or is too large; return whether it is."""
    if name.split("/")[0] == "..":
        listing.skip_file(name, "its name leads out of the archive", "in ../")
    elif kind := find_clutter(name):
        listing.skip_file(name, _HIDDEN_REASON, kind)
    elif size > MAX_BYTES:
        listing.skip_file(name, f"over {MAX_BYTES >> 20} MB, the limit for an image's file")
    else:
        return False
    return True


def _get_offset(pair: tuple[tarfile.TarInfo, int]) -> int:
    return pair[0].offset


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is neither a folder nor a tar archive, a ZIP archive or a CSV file: {error}; "
            "unpack or repair it, or give a folder with one sub-folder of images per label"
        ) from None


def _require_end_block(archive: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the archive ends with a block of zeros (POSIX.1, ustar).

    `tarfile` also stops at a damaged header and would silently drop the images behind it.
    """
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short or damaged")


def _resolve_link(name: str, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the member that a link leads to, if the archive has it; otherwise the member itself."""
    for _ in range(_MAX_LINKS):
        if not (member.islnk() or member.issym()):
            break
        base = posixpath.dirname(name) if member.issym() else ""
        name = normalize_member_name(posixpath.join(base, member.linkname))
        member = members.get(name, member)
    return member


_MAX_LINKS: Final = 8
"""Maximum number of links in a chain; some chains are circular."""
