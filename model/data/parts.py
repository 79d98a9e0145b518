"""Names of the parts of a data set: `train`, `Testing`, `valid_set`, `val2017`, `seg_test`, ..."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from fovea.model.data.inventory import Part

_NAMES: Final = {
    Part.TRAIN: "train training trn trainval",
    Part.VALIDATION: "val valid validate validation validating dev devel development",
    Part.TEST: "test testing tst eval evaluate evaluation holdout heldout",
}
"""Words for each part.

The words include the keywords of Hugging Face's `datasets` (`data_files.py`, where `eval` is a test part and
`dev` a validation part) and others that public data sets use.
"""

_WORDS: Final = {word: part for part, names in _NAMES.items() for word in names.split()}


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_FILLERS: Final = words(
    """set sets data dataset datasets split splits subset part folder dir directory image images img imgs
    photo photos pic pics picture pictures jpg jpeg png file files public private final full my the of new"""
)
"""Words that do not change the meaning of a part's name."""

_SUFFIXES: Final = ("dataset", "images", "image", "imgs", "img", "split", "data", "set", "s")
"""Suffixes of compounds: `trainset`, `testdata`."""

CONTAINERS: Final = words(
    """images image imgs img jpegimages pngimages photos pictures labels label labelstxt annotations
    annotation annots masks mask segmentation segmentations segmentationclass segmentationobject
    segmentationmask imagesets gt groundtruth bboxes boxes"""
)
"""Folder names for images and annotations in detection and segmentation data sets."""


def part_of(name: str) -> Part | None:
    """Return the part that a name stands for, ignoring case, separators and numbers, or None.

    A name with another word, such as `test_tube`, stands for no part.
    """
    key = _key(name)
    return key[0] if key and not key[1] else None


def parts_of(names: Iterable[str]) -> dict[str, Part]:
    """Return the parts among the names of sibling folders.

    Besides the names that `part_of` knows, names that differ from a sibling only in the part's word are
    parts: `seg_train` and `seg_test`.
    """
    keys = {name: key for name in names if (key := _key(name))}
    families: dict[tuple[str, ...], set[Part]] = {}
    for part, rest in keys.values():
        families.setdefault(rest, set()).add(part)
    return {name: part for name, (part, rest) in keys.items() if not rest or len(families[rest]) > 1}


def is_container(name: str) -> bool:
    """Return whether detection data sets use this folder name."""
    return re.sub(r"[\W_]+", "", name).casefold() in CONTAINERS


def _key(name: str) -> tuple[Part, tuple[str, ...]] | None:
    """Return the part in a name and the other words, with `*` for the part; None without a part."""
    for case_splits in (False, True):  # `TRAIN`, then `TrainSet`
        if key := _key_of(_split(name, case_splits=case_splits)):
            return key
    return None


def _key_of(own: list[str]) -> tuple[Part, tuple[str, ...]] | None:
    found = [place for place, word in enumerate(own) if _part_of_word(word)]
    if not found:
        return None
    parts = {_part_of_word(own[place]) for place in found}
    part = parts.pop()
    if parts or part is None:
        return None
    others = [word for word in own if not _part_of_word(word) and word not in _FILLERS]
    where = found[0] - sum(word in _FILLERS for word in own[: found[0]])
    return part, (*others[:where], "*", *others[where:]) if others else ()


def _part_of_word(word: str) -> Part | None:
    if word in _WORDS:
        return _WORDS[word]
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and word.removesuffix(suffix) in _WORDS:
            return None if word == "trains" else _WORDS[word.removesuffix(suffix)]  # trains are vehicles
    return None


def _split(name: str, *, case_splits: bool) -> list[str]:
    """Split a name into lower-case words without numbers."""
    name = unicodedata.normalize("NFKC", name)
    if case_splits:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    name = name.casefold()
    name = re.sub(r"\b(hold|held)[\W_]+out\b", "holdout", name)
    name = re.sub(r"\b(train)[\W_]+(val)\b", "trainval", name)
    return [word for word in re.split(r"[\W\d_]+", name) if word]
