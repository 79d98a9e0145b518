"""Labels and parts of images, derived from folders.

The label of an image is the folder that contains the image. Folders above or below the labels may be parts
(`train/cat/1.png`, `cat/train/1.png`). An ambiguous layout is an error; the code never guesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fovea.model.data.examples import DataError
from fovea.model.data.inventory import Part, some
from fovea.model.data.parts import is_container, parts_of

Path = tuple[str, ...]
"""Folders from the source's top down to a file."""

_LISTED: Final = 3
"""Maximum number of folders in one sentence."""

_LONE: Final = 2
"""Number of sibling labels from which a folder `train` with images is a label too: the vehicle."""


@dataclass(frozen=True)
class Placement:
    """The label and the part of an image."""

    label: str
    part: Part
    where: str
    """Folder that names the part; empty if there is none."""


@dataclass(frozen=True)
class Arrangement:
    """The meaning of a data set's folders."""

    placements: dict[str, Placement]
    """Placements by image name."""
    left_out: dict[str, tuple[str, str]]
    """(folder, reason) of images without a label, by image name."""
    notes: tuple[str, ...] = ()


def arrange(names: Iterable[str], label_depth: int | None = None) -> Arrangement:
    """Return label and part of each image, from its name, a path with `/`.

    `label_depth` states which folder from the top is the label if that is ambiguous; 1 is the topmost. Raises
    `DataError` if the folders are ambiguous.
    """
    leaves: dict[Path, list[str]] = {}
    for name in names:
        leaves.setdefault(tuple(name.split("/")[:-1]), []).append(name)
    tree = _Tree(leaves, label_depth)
    left_out: dict[str, tuple[str, str]] = {}
    placements: dict[str, Placement] = {}
    depths: dict[int, str] = {}
    strays: set[str] = set()
    for leaf, own in leaves.items():
        if reason := tree.reason(leaf):
            left_out |= dict.fromkeys(own, reason)
            continue
        others = tree.others(leaf)
        depths.setdefault(len(others), own[0])
        strays |= {leaf[place] for place in others if len(tree.common) <= place < tree.label(leaf)}
        placements |= dict.fromkeys(own, Placement(leaf[tree.label(leaf)], *tree.part(leaf)))
    if label_depth is None:
        _require_one_depth(depths)
        _require_no_containers(placements)
    return Arrangement(placements, left_out, (*tree.notes, *_strays(strays)))


class _Tree:
    """The tree of all folders with images, with the folders that are parts."""

    def __init__(self, leaves: Iterable[Path], label_depth: int | None) -> None:
        self.label_depth = label_depth
        self.leaves = sorted(leaves)
        self.notes: list[str] = []
        self._children: dict[Path, set[str]] = {}
        for leaf in self.leaves:
            for end in range(len(leaf)):
                self._children.setdefault(leaf[:end], set()).add(leaf[end])
        self.common: Path = _shared_folders([leaf for leaf in self.leaves if leaf])
        """Folders that all images share; these are neither labels nor parts."""
        self._parts: dict[Path, Part] = {}
        self._find_parts()
        if label_depth is None:
            self._settle_leaves()
        self.above = any(self.parts_in(leaf) and leaf not in self._parts for leaf in self.leaves)
        """Flag for parts above the labels; otherwise parts are below the labels or there are none."""
        if label_depth is None and not self.above:
            self._require_labels_above()
        self.labels_in_parts = {
            leaf[self.label(leaf)]
            for leaf in self.leaves
            if self.parts_in(leaf) and not self._has_no_label(leaf)
        }

    def _find_parts(self) -> None:
        for parent in sorted(self._children, key=len):
            if self.label_depth is not None and len(parent) == self.label_depth - 1:
                continue  # these are the labels, whatever their names
            found = parts_of(self._children[parent])
            if parent in self._parts and parent[-1] in self._children[parent]:  # training_set/training_set/
                found[parent[-1]] = self._parts[parent]
            self._parts.update({(*parent, name): part for name, part in found.items()})

    def parts_in(self, path: Path) -> dict[int, Part]:
        """Return the parts among a path's folders, by position."""
        ends = range(1, len(path) + 1)
        return {end - 1: self._parts[path[:end]] for end in ends if path[:end] in self._parts}

    def label(self, path: Path) -> int:
        """Return the position of the label in a path that has a label."""
        if self.label_depth is not None:
            return self.label_depth - 1
        parts = self.parts_in(path)
        return max(place for place in range(len(path)) if place not in parts)

    def others(self, path: Path) -> list[int]:
        """Return the positions of the folders that are neither the label nor parts."""
        parts, label = self.parts_in(path), self.label(path)
        return [place for place in range(len(path)) if place not in parts and place != label]

    def reason(self, path: Path) -> tuple[str, str] | None:
        """Return the folder and the reason why its images are left out; None if its images are used."""
        where = f"in {'/'.join(path)}/" if path else "at the top"
        if self.label_depth is not None and len(path) < self.label_depth:
            return where, f"images above folder {self.label_depth} have no label"
        if self._has_no_label(path):
            if self.parts_in(path):
                return where, "images right in a part have no label"
            return where, "images above the labels have no label"
        if not self._parts or self.parts_in(path):
            return None
        if Part.TRAIN not in self._parts.values() and path[self.label(path)] in self.labels_in_parts:
            return None  # cat/, dog/, test/cat/, test/dog/
        stray = path[: len(_shared_folders([path, self.common])) + 1]
        beside = [folder for folder in self._parts if folder[:-1] == stray[:-1]] or list(self._parts)
        known = some(sorted("/".join(folder) + "/" for folder in beside))
        return (
            f"in {'/'.join(stray)}/",
            f"the folder is in no part: it lies beside {known}, and its name is none of a part",
        )

    def part(self, path: Path) -> tuple[Part, str]:
        """Return an image's part and the folder that names the part.

        Raises `DataError` if the folders name two parts.
        """
        parts = self.parts_in(path)
        if len(set(parts.values())) > 1:  # a whole data set in a folder `test`
            parts = {place: part for place, part in parts.items() if place >= len(self.common)}
        if len(set(parts.values())) > 1:
            several = " and in ".join(f"{path[place]}/" for place in parts)
            raise DataError(
                f"images in {'/'.join(path)}/ lie in {several}, which are different parts; rename a folder"
            )
        if not parts:
            return Part.TRAIN, ""
        last = max(parts)
        return parts[last], f"{'/'.join(path[: last + 1]) if self.above else f'…/{path[last]}'}/"

    def _has_no_label(self, leaf: Path) -> bool:
        """Return whether a folder is a part above the labels, or lies above everything."""
        if self.label_depth is not None:
            return len(leaf) < self.label_depth
        if len(self.parts_in(leaf)) == len(leaf) or (self.above and leaf in self._parts):
            return True
        return leaf == self.common and len(self.leaves) > 1

    def _settle_leaves(self) -> None:
        """Decide whether folders with a part's name among labels are labels.

        Raises `DataError` if that is ambiguous.
        """
        for leaf in [leaf for leaf in self.leaves if leaf in self._parts and leaf not in self._children]:
            siblings = [(*leaf[:-1], name) for name in sorted(self._children[leaf[:-1]])]
            labels = [folder for folder in siblings if folder in self.leaves and folder not in self._parts]
            rivals = [folder for folder in siblings if folder in self._parts and folder != leaf]
            if not labels:
                continue
            shown = some("/".join(folder) + "/" for folder in labels)
            if leaf[-1].casefold() == "train" and len(labels) >= _LONE and not rivals:
                del self._parts[leaf]
                self.notes.append(
                    f"{'/'.join(leaf)}/ is taken for a label, since it lies among labels: {shown}"
                )
                continue
            raise DataError(
                f"{'/'.join(leaf)}/ is called like a part of a data set, has images right in it and lies "
                f"beside {shown}: put its images into sub-folders by label, rename it, or, if it is a label, "
                f"say so with --label-depth {len(leaf)}"
            )

    def _require_labels_above(self) -> None:
        """Raise `DataError` if images lie directly in the parts without labels above the parts."""
        flat = [leaf for part in Part for leaf in self.leaves if self._parts.get(leaf) is part]
        labels = {leaf[self.label(leaf)] for leaf in flat if len(self.parts_in(leaf)) < len(leaf)}
        labels -= set(self.common)
        if flat and (len(labels) < 2 or all(map(is_container, labels))):
            shown = " and ".join("/".join(leaf) + "/" for leaf in flat[:_LISTED])
            raise DataError(
                f"images lie right in {shown}: these are parts of a data set, not labels; put the images "
                "there into sub-folders by label, such as train/cat/, or give a CSV file that names the "
                "labels"
            )


def _shared_folders(paths: list[Path]) -> Path:
    """Return the folders with which all paths begin."""
    if not paths:
        return ()
    first, last = min(paths), max(paths)
    different = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(different, min(len(first), len(last)))]


def _require_one_depth(depths: dict[int, str]) -> None:
    """Raise `DataError` if labels lie at several depths; `depths` holds an image name for each depth."""
    if len(depths) < 2:
        return
    high, low = (depths[depth].split("/") for depth in (min(depths), max(depths)))
    raise DataError(
        f"labels lie at several depths: is it {high[-2]!r} of {'/'.join(high)}, and {low[-2]!r} of "
        f"{'/'.join(low)}? Say which folder from the top is the label, such as --label-depth "
        f"{len(high) - 1}, or move the images"
    )


def _require_no_containers(placements: dict[str, Placement]) -> None:
    """Raise `DataError` if all labels have folder names of object detection data sets."""
    labels = {placement.label for placement in placements.values()}
    if labels and all(map(is_container, labels)):
        shown = " and ".join(f"{label}/" for label in sorted(labels)[:3])
        raise DataError(
            f"images lie in {shown}, as in a data set for detection or segmentation: these are not labels; "
            "put the images into sub-folders by label, give a CSV file that names the labels, or, if these "
            f"are labels, say so with --label-depth {next(iter(placements)).count('/')}"
        )


def _strays(strays: set[str]) -> list[str]:
    if not strays:
        return []
    shown = some((f"{name}/" for name in sorted(strays)), 10)
    return [f"folders above the labels are taken neither for labels nor for parts: {shown}"]
