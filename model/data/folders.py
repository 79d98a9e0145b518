"""Labels and parts of images, derived from folders.

The label of an image is the folder that contains the image. Folders above or below the labels may be parts
(`train/cat/1.png`, `cat/train/1.png`). An ambiguous layout is an error; the code never guesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fovea.model.data.examples import DataError
from fovea.model.data.inventory import Part, join_names
from fovea.model.data.parts import find_parts, is_container

FolderPath = tuple[str, ...]
"""Folders from the source's top down to a file."""

_MAX_FOLDERS: Final = 3
"""Maximum number of folders in one sentence."""

_MIN_SIBLINGS: Final = 2
"""Number of sibling labels from which a folder `train` with images is a label too: the vehicle."""


@dataclass(frozen=True)
class Placement:
    """The label and the part of an image."""

    label: str
    part: Part
    part_folder: str
    """Folder that names the part; empty if there is none."""


@dataclass(frozen=True)
class FolderLayout:
    """The meaning of a data set's folders."""

    placements: dict[str, Placement]
    """Placements by image name."""
    skipped_images: dict[str, tuple[str, str]]
    """(folder, reason) of images without a label, by image name."""
    notes: tuple[str, ...] = ()


def detect_layout(names: Iterable[str], label_depth: int | None = None) -> FolderLayout:
    """Return label and part of each image, from its name, a path with `/`.

    `label_depth` states which folder from the top is the label if that is ambiguous; 1 is the topmost. Raises
    `DataError` if the folders are ambiguous.
    """
    leaves: dict[FolderPath, list[str]] = {}
    for name in names:
        leaves.setdefault(tuple(name.split("/")[:-1]), []).append(name)
    tree = _FolderTree(leaves, label_depth)
    skipped_images: dict[str, tuple[str, str]] = {}
    placements: dict[str, Placement] = {}
    depths: dict[int, str] = {}
    unused_folders: set[str] = set()
    for leaf, leaf_names in leaves.items():
        if reason := tree.find_skip_reason(leaf):
            skipped_images |= dict.fromkeys(leaf_names, reason)
            continue
        unused_positions = tree.find_unused(leaf)
        depths.setdefault(len(unused_positions), leaf_names[0])
        unused_folders |= {
            leaf[position]
            for position in unused_positions
            if len(tree.common_folders) <= position < tree.find_label(leaf)
        }
        placements |= dict.fromkeys(leaf_names, Placement(leaf[tree.find_label(leaf)], *tree.find_part(leaf)))
    if label_depth is None:
        _require_one_depth(depths)
        _require_no_containers(placements)
    return FolderLayout(placements, skipped_images, (*tree.notes, *_describe_unused_folders(unused_folders)))


class _FolderTree:
    """The tree of all folders with images, with the folders that are parts."""

    def __init__(self, leaves: Iterable[FolderPath], label_depth: int | None) -> None:
        self.label_depth = label_depth
        self.leaves = sorted(leaves)
        self.notes: list[str] = []
        self._children: dict[FolderPath, set[str]] = {}
        for leaf in self.leaves:
            for end in range(len(leaf)):
                self._children.setdefault(leaf[:end], set()).add(leaf[end])
        self.common_folders: FolderPath = _find_shared_folders([leaf for leaf in self.leaves if leaf])
        """Folders that all images share; these are neither labels nor parts."""
        self._parts: dict[FolderPath, Part] = {}
        self._find_parts()
        if label_depth is None:
            self._resolve_part_leaves()
        self.has_parts_above = any(self.list_parts(leaf) and leaf not in self._parts for leaf in self.leaves)
        """Flag for parts above the labels; otherwise parts are below the labels or there are none."""
        if label_depth is None and not self.has_parts_above:
            self._require_labels_above()
        self.labels_in_parts = {
            leaf[self.find_label(leaf)]
            for leaf in self.leaves
            if self.list_parts(leaf) and not self._has_no_label(leaf)
        }

    def _find_parts(self) -> None:
        for parent in sorted(self._children, key=len):
            if self.label_depth is not None and len(parent) == self.label_depth - 1:
                continue  # these are the labels, whatever their names
            parts = find_parts(self._children[parent])
            if parent in self._parts and parent[-1] in self._children[parent]:  # training_set/training_set/
                parts[parent[-1]] = self._parts[parent]
            self._parts.update({(*parent, name): part for name, part in parts.items()})

    def list_parts(self, path: FolderPath) -> dict[int, Part]:
        """Return the parts among a path's folders, by position."""
        ends = range(1, len(path) + 1)
        return {end - 1: self._parts[path[:end]] for end in ends if path[:end] in self._parts}

    def find_label(self, path: FolderPath) -> int:
        """Return the position of the label in a path that has a label."""
        if self.label_depth is not None:
            return self.label_depth - 1
        parts = self.list_parts(path)
        return max(position for position in range(len(path)) if position not in parts)

    def find_unused(self, path: FolderPath) -> list[int]:
        """Return the positions of the folders that are neither the label nor parts."""
        parts, label = self.list_parts(path), self.find_label(path)
        return [position for position in range(len(path)) if position not in parts and position != label]

    def find_skip_reason(self, path: FolderPath) -> tuple[str, str] | None:
        """Return the folder and the reason why its images are left out; None if its images are used."""
        location = f"in {'/'.join(path)}/" if path else "at the top"
        if self.label_depth is not None and len(path) < self.label_depth:
            return location, f"images above folder {self.label_depth} have no label"
        if self._has_no_label(path):
            if self.list_parts(path):
                return location, "images directly in a part have no label"
            return location, "images above the labels have no label"
        if not self._parts or self.list_parts(path):
            return None
        if Part.TRAIN not in self._parts.values() and path[self.find_label(path)] in self.labels_in_parts:
            return None  # cat/, dog/, test/cat/, test/dog/
        unused_folder = path[: len(_find_shared_folders([path, self.common_folders])) + 1]
        siblings = [folder for folder in self._parts if folder[:-1] == unused_folder[:-1]] or list(
            self._parts
        )
        sibling_list = join_names(sorted("/".join(folder) + "/" for folder in siblings))
        return (
            f"in {'/'.join(unused_folder)}/",
            f"the folder is in no part: it lies beside {sibling_list}, and its name does not name a part",
        )

    def find_part(self, path: FolderPath) -> tuple[Part, str]:
        """Return an image's part and the folder that names the part.

        Raises `DataError` if the folders name two parts.
        """
        parts = self.list_parts(path)
        if len(set(parts.values())) > 1:  # a whole data set in a folder `test`
            parts = {
                position: part for position, part in parts.items() if position >= len(self.common_folders)
            }
        if len(set(parts.values())) > 1:
            part_folders = " and in ".join(f"{path[position]}/" for position in parts)
            raise DataError(
                f"images in {'/'.join(path)}/ lie in {part_folders}, which are different parts; "
                "rename a folder"
            )
        if not parts:
            return Part.TRAIN, ""
        last_position = max(parts)
        return parts[
            last_position
        ], f"{'/'.join(path[: last_position + 1]) if self.has_parts_above else f'…/{path[last_position]}'}/"

    def _has_no_label(self, leaf: FolderPath) -> bool:
        """Return whether a folder is a part above the labels, or lies above everything."""
        if self.label_depth is not None:
            return len(leaf) < self.label_depth
        if len(self.list_parts(leaf)) == len(leaf) or (self.has_parts_above and leaf in self._parts):
            return True
        return leaf == self.common_folders and len(self.leaves) > 1

    def _resolve_part_leaves(self) -> None:
        """Decide whether folders with a part's name among labels are labels.

        Raises `DataError` if that is ambiguous.
        """
        for leaf in [leaf for leaf in self.leaves if leaf in self._parts and leaf not in self._children]:
            siblings = [(*leaf[:-1], name) for name in sorted(self._children[leaf[:-1]])]
            labels = [folder for folder in siblings if folder in self.leaves and folder not in self._parts]
            other_parts = [folder for folder in siblings if folder in self._parts and folder != leaf]
            if not labels:
                continue
            label_list = join_names("/".join(folder) + "/" for folder in labels)
            if leaf[-1].casefold() == "train" and len(labels) >= _MIN_SIBLINGS and not other_parts:
                del self._parts[leaf]
                self.notes.append(
                    f"{'/'.join(leaf)}/ is read as a label, because it lies among labels: {label_list}"
                )
                continue
            raise DataError(
                f"{'/'.join(leaf)}/ is named like a part of a data set, contains images directly and lies "
                f"beside {label_list}: put its images into sub-folders by label, rename it, or, if it is a "
                f"label, pass --label-depth {len(leaf)}"
            )

    def _require_labels_above(self) -> None:
        """Raise `DataError` if images lie directly in the parts without labels above the parts."""
        part_leaves = [leaf for part in Part for leaf in self.leaves if self._parts.get(leaf) is part]
        labels = {
            leaf[self.find_label(leaf)] for leaf in part_leaves if len(self.list_parts(leaf)) < len(leaf)
        }
        labels -= set(self.common_folders)
        if part_leaves and (len(labels) < 2 or all(map(is_container, labels))):
            folder_list = " and ".join("/".join(leaf) + "/" for leaf in part_leaves[:_MAX_FOLDERS])
            raise DataError(
                f"images lie directly in {folder_list}: these are parts of a data set, not labels; put the "
                "images there into sub-folders by label, such as train/cat/, or give a CSV file that names "
                "the labels"
            )


def _find_shared_folders(paths: list[FolderPath]) -> FolderPath:
    """Return the folders with which all paths begin."""
    if not paths:
        return ()
    first, last = min(paths), max(paths)
    differences = (
        position for position, (one, other) in enumerate(zip(first, last, strict=False)) if one != other
    )
    return first[: next(differences, min(len(first), len(last)))]


def _require_one_depth(depths: dict[int, str]) -> None:
    """Raise `DataError` if labels lie at several depths; `depths` holds an image name for each depth."""
    if len(depths) < 2:
        return
    high, low = (depths[depth].split("/") for depth in (min(depths), max(depths)))
    raise DataError(
        f"labels lie at several depths: the label of {'/'.join(high)} would be {high[-2]!r}, and that of "
        f"{'/'.join(low)} {low[-2]!r}; pass the number of the folder from the top that is the label, such as "
        f"--label-depth {len(high) - 1}, or move the images"
    )


def _require_no_containers(placements: dict[str, Placement]) -> None:
    """Raise `DataError` if all labels have folder names of object detection data sets."""
    labels = {placement.label for placement in placements.values()}
    if labels and all(map(is_container, labels)):
        folder_list = " and ".join(f"{label}/" for label in sorted(labels)[:3])
        raise DataError(
            f"images lie in {folder_list}, as in a data set for detection or segmentation: these are not "
            "labels; put the images into sub-folders by label, give a CSV file that names the labels, or, if "
            f"these are labels, pass --label-depth {next(iter(placements)).count('/')}"
        )


def _describe_unused_folders(names: set[str]) -> list[str]:
    if not names:
        return []
    folder_list = join_names((f"{name}/" for name in sorted(names)), 10)
    return [f"folders above the labels are used neither as labels nor as parts: {folder_list}"]
