"""The true label of an image: the name of its folder."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote, urlsplit

from fovea.model.data.inventory import to_printable
from fovea.model.data.spelling import clean_label, normalize_label

_NEAREST_CUTOFF: Final = 0.7
"""Similarity, from 0 to 1, from which a label is worth suggesting for a folder."""


def find_folder(path: str) -> str | None:
    """Return the name of the last folder of a path or URI, also inside an archive; None without a folder.

    The folder of a plain file name is the current folder. The bucket or host of a URI is no folder.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        folders = os.path.abspath(path).split("/")[:-1]  # noqa: PTH100 - normalizes `..` as text too
        return to_printable(folders[-1]) or None
    if scheme.lower() in ("http", "https"):  # its query may hold a `/`, and its names are quoted
        folders = [unquote(folder) for folder in urlsplit(path).path.split("/")[1:-1]]
    else:
        folders = rest.split("/")[1:-1]
    folders = [folder for folder in folders if folder]
    return to_printable(folders[-1]) if folders else None


class FolderLabels:
    """The labels of a model, found by the names of folders."""

    def __init__(self, labels: Sequence[str]) -> None:
        """Accept the labels in the order of the model's outputs."""
        self.labels = tuple(labels)
        self._exact_indices = {label: index for index, label in enumerate(self.labels)}
        self._similar_indices: dict[str, list[int]] = defaultdict(list)
        for index, label in enumerate(self.labels):
            self._similar_indices[_simplify(label)].append(index)

    def get_index(self, label: str) -> int:
        """Return the index of a label of the model."""
        return self._exact_indices[label]

    def find_index(self, folder: str) -> int | None:
        """Return the index of the label that a folder is named after; None if there is none, or several.

        A name that is no label itself matches the only label that differs in case, accents' composition,
        spaces, `_` or `-`.
        """
        exact_index = self._exact_indices.get(folder)
        if exact_index is not None:
            return exact_index
        similar_indices = self._similar_indices.get(_simplify(folder), ())
        return similar_indices[0] if len(similar_indices) == 1 else None

    def explain_mismatch(self, folder: str) -> str:
        """Return a hint for a folder that is named after no label; empty if there is none."""
        candidates = [self.labels[index] for index in self._similar_indices.get(_simplify(folder), ())]
        if candidates:
            return f"{' and '.join(map(repr, candidates))} are both spelled like it; rename the folder to one"
        nearest_labels = difflib.get_close_matches(folder, self.labels, n=1, cutoff=_NEAREST_CUTOFF)
        return f"the nearest label is {nearest_labels[0]!r}" if nearest_labels else ""


def _simplify(name: str) -> str:
    return normalize_label(clean_label(name))
