"""Names of the parts of a data set: `train`, `Testing`, `valid_set`, `val2017`, `seg_test`, ..."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from fovea.model.data.inventory import Part

_PART_NAMES: Final = {
    Part.TRAIN: "train training trn trainval",
    Part.VALIDATION: "val valid validate validation validating dev devel development",
    Part.TEST: "test testing tst eval evaluate evaluation holdout heldout",
}
"""Words for each part.

The words include the keywords of Hugging Face's `datasets` (`data_files.py`, where `eval` is a test part and
`dev` a validation part) and others that public data sets use.
"""

_PART_BY_WORD: Final = {word: part for part, names in _PART_NAMES.items() for word in names.split()}


def split_words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_FILLERS: Final = split_words(
    """set sets data dataset datasets split splits subset part folder dir directory image images img imgs
    photo photos pic pics picture pictures jpg jpeg png file files public private final full my the of new"""
)
"""Words that do not change the meaning of a part's name."""

_SUFFIXES: Final = ("dataset", "images", "image", "imgs", "img", "split", "data", "set", "s")
"""Suffixes of compounds: `trainset`, `testdata`."""

CONTAINERS: Final = split_words(
    """images image imgs img jpegimages pngimages photos pictures labels label labelstxt annotations
    annotation annots masks mask segmentation segmentations segmentationclass segmentationobject
    segmentationmask imagesets gt groundtruth bboxes boxes"""
)
"""Folder names for images and annotations in detection and segmentation data sets."""


def parse_part(name: str) -> Part | None:
    """Return the part that a name stands for, ignoring case, separators and numbers, or None.

    A name with another word, such as `test_tube`, stands for no part.
    """
    key = _parse_name(name)
    return key[0] if key and not key[1] else None


def find_parts(names: Iterable[str]) -> dict[str, Part]:
    """Return the parts among the names of sibling folders.

    Besides the names that `parse_part` knows, names that differ from a sibling only in the part's word are
    parts: `seg_train` and `seg_test`.
    """
    keys = {name: key for name in names if (key := _parse_name(name))}
    parts_by_rest: dict[tuple[str, ...], set[Part]] = {}
    for part, rest in keys.values():
        parts_by_rest.setdefault(rest, set()).add(part)
    return {name: part for name, (part, rest) in keys.items() if not rest or len(parts_by_rest[rest]) > 1}


def is_container(name: str) -> bool:
    """Return whether detection data sets use this folder name."""
    return re.sub(r"[\W_]+", "", name).casefold() in CONTAINERS


def _parse_name(name: str) -> tuple[Part, tuple[str, ...]] | None:
    """Return the part in a name and the other words, with `*` for the part; None without a part."""
    for case_splits in (False, True):  # `TRAIN`, then `TrainSet`
        if key := _parse_words(_split_name(name, case_splits=case_splits)):
            return key
    return None


def _parse_words(name_words: list[str]) -> tuple[Part, tuple[str, ...]] | None:
    positions = [position for position, word in enumerate(name_words) if _parse_word(word)]
    if not positions:
        return None
    parts = {_parse_word(name_words[position]) for position in positions}
    part = parts.pop()
    if parts or part is None:
        return None
    other_words = [word for word in name_words if not _parse_word(word) and word not in _FILLERS]
    part_position = positions[0] - sum(word in _FILLERS for word in name_words[: positions[0]])
    return part, (*other_words[:part_position], "*", *other_words[part_position:]) if other_words else ()


def _parse_word(word: str) -> Part | None:
    if word in _PART_BY_WORD:
        return _PART_BY_WORD[word]
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and word.removesuffix(suffix) in _PART_BY_WORD:
            return (
                None if word == "trains" else _PART_BY_WORD[word.removesuffix(suffix)]
            )  # trains are vehicles
    return None


def _split_name(name: str, *, case_splits: bool) -> list[str]:
    """Split a name into lower-case words without numbers."""
    name = unicodedata.normalize("NFKC", name)
    if case_splits:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    name = name.casefold()
    name = re.sub(r"\b(hold|held)[\W_]+out\b", "holdout", name)
    name = re.sub(r"\b(train)[\W_]+(val)\b", "trainval", name)
    return [word for word in re.split(r"[\W\d_]+", name) if word]
