"""Labelled images against an imported model: how often it is right, and whether another recipe does better.

A folder belongs to the label of the same name. Case is ignored, and spaces, `_` and `-` are alike. A WordNet
id (`n01440764`, `n01440764_tench`) goes first: it belongs to the label whose id the labels file says, or that
begins with it; where no label has this id, what follows it is the name. Of a label such as `tench, Tinca
tinca` the part before the first comma is a name too. What fits two labels, or none, is refused.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import WORDNET, Labels
from fovea.model.data.decoding import in_threads, pixels_of
from fovea.model.data.sources import Folder
from fovea.service.artifact.contract import Geometry
from fovea.service.errors import RequestError, one_line
from fovea.service.inference.drift import brightness_of
from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import Pixels, draft_scale

TRIED: Final = 200
"""Images on which other recipes are tried, spread over all."""

_CHUNK: Final = 16
"""Images that are decoded and run together."""

_TOP: Final = 5

_ERRORS: Final = 2.0
"""Standard errors of the mean paired difference by which another recipe must be better to be told."""

_POINTS: Final = 0.03
"""And by how much at least, of top-1 or of the true label's mean probability: a little more or less of the
image's border changes them by a point or two for reasons of its own."""

_FEWEST: Final = 8
"""Fewer images tell recipes apart by chance."""

FAST_IMAGES: Final = 100
"""Least images, of those that `fast` decodes at a smaller scale, that show that it loses nothing: where of
100 no answer changes, of all fewer than 3 % do, in 19 of 20 cases (the rule of three)."""

Run = Callable[[Pixels], Floats]
"""Probabilities, float32 (n, labels), of pixels (n, H, W, 3)."""


@dataclass(frozen=True)
class Labelled:
    """Images whose label is known."""

    name: str
    paths: tuple[Path, ...]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Labelled:
        """Those of `rows`."""
        return Labelled(self.name, tuple(self.paths[row] for row in rows), self.targets[rows])

    @property
    def spread(self) -> npt.NDArray[np.int64]:
        """Rows of `TRIED` images at most, spread over all."""
        return np.unique(np.linspace(0, len(self) - 1, min(TRIED, len(self))).astype(np.int64))


@dataclass(frozen=True)
class Scores:
    """What a model says of labelled images, a row each."""

    best: npt.NDArray[np.int64]
    """The most probable label."""
    confidence: Floats
    """Its probability."""
    true: Floats
    """The true label's probability."""
    rank: npt.NDArray[np.int64]
    """How many labels are more probable than the true one."""
    brightness: Floats
    probabilities: Floats

    @property
    def right(self) -> npt.NDArray[np.float64]:
        """1 where the most probable label is the true one, else 0."""
        right: npt.NDArray[np.float64] = (self.rank == 0).astype(np.float64)
        return right

    @property
    def top1(self) -> float:
        """How often the most probable label is the true one, of 1."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """How often the true label is among the five most probable ones, of 1."""
        return float((self.rank < _TOP).mean())

    def take(self, rows: npt.NDArray[np.int64]) -> Scores:
        """Those of `rows`."""
        return Scores(**{name: values[rows] for name, values in vars(self).items()})


# --- which image has which label -----------------------------------------------------------------


def labelled(folder: Path, labels: Labels) -> Labelled:
    """The images in sub-folders that are called as the labels are. Raises `ImportRefused`."""
    if not folder.is_dir():
        raise ImportRefused(
            f"--check {folder} is not a folder; it takes one with a sub-folder of images per label"
        )
    source = Folder(folder)
    files = source.files()
    if not files:
        raise ImportRefused(f"--check {folder} has no sub-folder with images in it")
    find = Names(labels)
    owners = {name: find(name) for name in sorted({file.labels[0] for file in files})}
    targets = np.array([owners[file.labels[0]] for file in files], np.int64)
    return Labelled(source.name, tuple(source.paths(file.name for file in files)), targets)


class Names:
    """Finds the label that a folder's name stands for."""

    def __init__(self, labels: Labels) -> None:
        self._ids = {wordnet: place for place, wordnet in enumerate(labels.ids) if wordnet}
        self._known: dict[str, set[int]] = defaultdict(set)
        for place, (wordnet, label) in enumerate(zip(labels.ids, labels.names, strict=True)):
            bare = label.removeprefix(wordnet)
            for name in (label, bare, bare.partition(",")[0], _without_number(label, labels)):
                self._known[_plain(name)].add(place)
        self._names = labels.names

    def __call__(self, folder: str) -> int:
        """The label's place. Raises `ImportRefused`."""
        if folder in self._names:  # `Cardigan`, the dog, and `cardigan`, which is worn, are both ImageNet's
            return self._names.index(folder)
        wordnet = WORDNET.match(folder)
        if wordnet and wordnet[0] in self._ids:
            return self._ids[wordnet[0]]
        found = self._known.get(_plain(folder)) or self._known.get(_plain(WORDNET.sub("", folder, count=1)))
        if not found:
            raise ImportRefused(self._unknown(folder))
        if len(found) > 1:
            several = ", ".join(repr(self._names[place]) for place in sorted(found))
            raise ImportRefused(
                f"--check: the folder {folder!r} fits several labels: {several}; use one of these"
            )
        return next(iter(found))

    def _unknown(self, folder: str) -> str:
        where = f"--check: the folder {folder!r} is"
        if WORDNET.fullmatch(folder) and not self._ids:
            return f"{where} a WordNet id, and the labels have none; name it by its label"
        near = difflib.get_close_matches(_plain(folder), [name for name in self._known if name], 1, 0)
        label = self._names[min(self._known[near[0]])] if near else self._names[0]
        return f"{where} none of the labels; the nearest is {label!r}"


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFC", name).casefold())).strip()


def _without_number(label: str, labels: Labels) -> str:
    """The label as the file had it, before it was told apart from another of the same name."""
    return next((name for name in labels.renamed if label.startswith(f"{name} (")), label)


# --- what a model says of them -------------------------------------------------------------------


def readable(images: Labelled, geometry: Geometry) -> tuple[Labelled, dict[str, str]]:
    """Those that can be decoded, and why the others cannot."""
    unreadable: dict[str, str] = {}
    rows = []
    for row, pixels in enumerate(_decoded(images, geometry)):
        if isinstance(pixels, str):
            unreadable[str(images.paths[row])] = pixels
        else:
            rows.append(row)
    if not rows:
        raise ImportRefused(f"none of the {len(images)} images in {images.name} can be read")
    return images.take(rows), unreadable


def scores(run: Run, images: Labelled, geometry: Geometry) -> Scores:
    """What `run` says of images that can all be read."""
    parts = []
    for pixels in _chunks(_decoded(images, geometry)):
        parts.append((run(pixels), brightness_of(pixels)))
    said = np.concatenate([part for part, _ in parts])
    true = said[np.arange(len(images)), images.targets]
    return Scores(
        best=said.argmax(axis=1).astype(np.int64),
        confidence=said.max(axis=1),
        true=true,
        rank=_ranks(said, images.targets),
        brightness=np.concatenate([part for _, part in parts]),
        probabilities=said,
    )


def _ranks(said: Floats, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """By the order in which the service answers: of equal ones the first."""
    order = np.argsort(-said, axis=1, kind="stable")
    ranks: npt.NDArray[np.int64] = (order == targets[:, None]).argmax(axis=1).astype(np.int64)
    return ranks


def _chunks(decoded: Iterator[Pixels | str]) -> Iterator[Pixels]:
    chunk: list[Pixels] = []
    for pixels in decoded:
        if isinstance(pixels, str):
            raise ImportRefused(f"an image of --check could be read once, and now cannot: {pixels}")
        chunk.append(pixels)
        if len(chunk) == _CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def _decoded(images: Labelled, geometry: Geometry) -> Iterator[Pixels | str]:
    """Pixels, or why there are none."""

    def read(path: Path) -> Pixels | str:
        try:
            return pixels_of(path.read_bytes(), geometry)
        except RequestError as error:
            return one_line(error)
        except OSError as error:
            return error.strerror or one_line(error)

    console = Console(stderr=True)
    return iter(
        track(
            in_threads(read, images.paths, alone=lambda _: False),
            description=f"Checking {len(images)} images",
            total=len(images),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


# --- comparisons ---------------------------------------------------------------------------------


def clearly_better(other: Scores, own: Scores) -> bool:
    """Is `other` right, or sure of the truth, more often than chance and taste explain?

    Of top-1, or of the true label's probability, the mean paired difference must be `_POINTS` at least, and
    more than `_ERRORS` of its standard errors.
    """
    pairs = ((other.right, own.right), (other.true.astype(np.float64), own.true.astype(np.float64)))
    return len(own.best) >= _FEWEST and any(_is_more(left - right) for left, right in pairs)


def _is_more(difference: npt.NDArray[np.float64]) -> bool:
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return bool(difference.mean() >= _POINTS and difference.mean() > _ERRORS * error)


def best_of(others: Mapping[str, Scores], own: Scores) -> str | None:
    """The recipe that does best of those that are clearly better."""
    better = {name: one for name, one in others.items() if clearly_better(one, own)}
    return max(better, key=lambda name: (better[name].top1, better[name].true.mean()), default=None)


def loses_nothing(fast: Scores, exact: Scores, scaled: int) -> bool:
    """Has each image the same most probable label either way, and does `fast` scale enough of them?"""
    return scaled >= FAST_IMAGES and bool((fast.best == exact.best).all())


def scaled_by_fast(images: Labelled, geometry: Geometry) -> int:
    """How many of them `fast` decodes at a smaller scale: others, small ones and PNGs, say little of it."""
    return sum(draft_scale(size, geometry) > 1 for path in images.paths if (size := _jpeg_size(path)))


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return image.size
    except Exception:  # it is of another format
        return None
