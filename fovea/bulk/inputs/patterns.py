"""Patterns of paths with `*`, `?`, `[abc]` and `**`, in the order of names and in bounded memory.

`glob.iglob` lists in the order of the disk, keeps whole folders in memory, and follows links with `**`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from fovea.service.image_folders import FolderListing, join_path, open_folder

_ANY_FOLDERS = "**"


def is_pattern(text: str) -> bool:
    """Return True if a path has a character with a meaning in patterns."""
    return glob.has_magic(text)


class PathPattern:
    """A pattern, matched name by name."""

    def __init__(self, pattern: str) -> None:
        """Parse a pattern; `**` as a whole name stands for any number of folders."""
        names = pattern.split("/")
        first = next(index for index, name in enumerate(names) if is_pattern(name))
        self.folder = "/".join(names[:first]) or ("/" if first else ".")
        """The folder above the first name with a pattern."""
        self._names = [name for name in names[first:] if name != "."]
        self.has_any_folders = _ANY_FOLDERS in self._names
        """Whether the pattern has `**`, and so matches at several depths."""

    def start(self) -> frozenset[int]:
        """Return the state before the first name: the parts of the pattern that may come next."""
        return self._pass_any_folders({0})

    def step(self, state: frozenset[int], name: str) -> frozenset[int]:
        """Return the state behind one more name; empty if nothing below the name can match."""
        following: set[int] = set()
        for index in state:
            if index == len(self._names):
                continue
            if self._names[index] == _ANY_FOLDERS:
                following.add(index)
            elif fnmatchcase(name, self._names[index]):
                following.add(index + 1)
        return self._pass_any_folders(following)

    def is_match(self, state: frozenset[int]) -> bool:
        """Return True if the names so far match the whole pattern."""
        return len(self._names) in state

    def matches(self, names: Sequence[str]) -> bool:
        """Return True if the names below `folder` match."""
        state = self.start()
        for name in names:
            state = self.step(state, name)
        return self.is_match(state)

    def _pass_any_folders(self, state: set[int]) -> frozenset[int]:
        for index in range(len(self._names)):
            if index in state and self._names[index] == _ANY_FOLDERS:
                state.add(index + 1)
        return frozenset(state)


class MatchedPath(NamedTuple):
    """A path that matches a pattern."""

    path: str
    is_folder: bool


def expand_pattern(text: str) -> Iterator[MatchedPath]:
    """Yield the paths that match, each once, in the order of names.

    Hidden files match no pattern, and links to folders are not followed. With `**` only files match, because
    a folder's files match themselves.
    """
    pattern = PathPattern(text)
    listings: list[tuple[str, FolderListing, frozenset[int]]] = []
    if (top := open_folder(pattern.folder)) is not None:
        listings.append((pattern.folder, top, pattern.start()))
    try:
        while listings:
            folder, listing, state = listings[-1]
            entry = next(listing, None)
            if entry is None:
                listing.close()
                listings.pop()
                continue
            name, is_folder = entry
            path, following = join_path(folder, name), pattern.step(state, name)
            if pattern.is_match(following) and not (is_folder and pattern.has_any_folders):
                yield MatchedPath(path, is_folder)
            elif is_folder and following:
                if (children := open_folder(path)) is None:
                    yield MatchedPath(path, is_folder=False)  # its entry has the error
                else:
                    listings.append((path, children, following))
    finally:
        for _, listing, _ in listings:
            listing.close()
