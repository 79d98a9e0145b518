"""Evaluation of an imported model on labelled images, and comparison with other recipes.

A folder belongs to the label of the same name, ignoring case; spaces, `_` and `-` are equivalent. A WordNet
id at the start (`n01440764`, `n01440764_tench`) takes precedence: it selects the label with this id in the
labels file, or the label that begins with the id. If no label has this id, the rest of the folder name is the
name. For a label such as `tench, Tinca tinca`, the part before the first comma is a name too. A folder that
fits two labels, or none, is refused.
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
from fovea.model.data.decoding import decode_pixels, map_in_threads
from fovea.model.data.sources import Folder
from fovea.service.artifact.contract import Geometry
from fovea.service.errors import RequestError, to_one_line
from fovea.service.inference.drift import brightness_of
from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import Pixels, choose_draft_scale

TRIED: Final = 200
"""Number of images on which other recipes are tried, spread over all images."""

_CHUNK: Final = 16
"""Number of images that are decoded and run together."""

_TOP: Final = 5

_ERRORS: Final = 2.0
"""Number of standard errors of the mean paired difference by which another recipe must be better."""

_POINTS: Final = 0.03
"""Minimum improvement in top-1 or in the true label's mean probability.

Slightly more or less of the image's border alone changes both by one or two percentage points.
"""

_FEWEST: Final = 8
"""Minimum number of images; fewer images distinguish recipes only by chance."""

FAST_IMAGES: Final = 100
"""Minimum number of images, decoded by `fast` at a smaller scale, for showing that `fast` is lossless.

If no answer of 100 changes, fewer than 3 % of all answers change, in 19 of 20 cases (rule of three).
"""

Run = Callable[[Pixels], Floats]
"""Function from pixels, uint8 (n, H, W, 3), to probabilities, float32 (n, labels)."""


@dataclass(frozen=True)
class Labelled:
    """Images with known labels."""

    name: str
    paths: tuple[Path, ...]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Labelled:
        """Return the images at `rows`."""
        return Labelled(self.name, tuple(self.paths[row] for row in rows), self.targets[rows])

    @property
    def spread(self) -> npt.NDArray[np.int64]:
        """Rows of at most `TRIED` images, spread over all images."""
        return np.unique(np.linspace(0, len(self) - 1, min(TRIED, len(self))).astype(np.int64))


@dataclass(frozen=True)
class Scores:
    """The predictions of a model for labelled images, one row each."""

    best: npt.NDArray[np.int64]
    """Index of the most probable label, int64 (n,)."""
    confidence: Floats
    """Probability of the most probable label, float32 (n,)."""
    true: Floats
    """Probability of the true label, float32 (n,)."""
    rank: npt.NDArray[np.int64]
    """Number of labels that are more probable than the true label, int64 (n,)."""
    brightness: Floats
    probabilities: Floats

    @property
    def right(self) -> npt.NDArray[np.float64]:
        """1 where the most probable label is true, else 0; float64 (n,)."""
        right: npt.NDArray[np.float64] = (self.rank == 0).astype(np.float64)
        return right

    @property
    def top1(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """Top-5 accuracy, 0 to 1."""
        return float((self.rank < _TOP).mean())

    def take(self, rows: npt.NDArray[np.int64]) -> Scores:
        """Return the scores at `rows`."""
        return Scores(**{name: values[rows] for name, values in vars(self).items()})


# --- matching of folders and labels --------------------------------------------------------------


def labelled(folder: Path, labels: Labels) -> Labelled:
    """Return the images in sub-folders that are named by label.

    Raises `ImportRefused`.
    """
    if not folder.is_dir():
        raise ImportRefused(
            f"--check {folder} is not a folder; it takes one with a sub-folder of images per label"
        )
    source = Folder(folder)
    files = source.list_files()
    if not files:
        raise ImportRefused(f"--check {folder} has no sub-folder with images in it")
    find = Names(labels)
    owners = {name: find(name) for name in sorted({file.labels[0] for file in files})}
    targets = np.array([owners[file.labels[0]] for file in files], np.int64)
    return Labelled(source.name, tuple(source.resolve_paths(file.name for file in files)), targets)


class Names:
    """A lookup of the label for a folder name."""

    def __init__(self, labels: Labels) -> None:
        self._ids = {wordnet: place for place, wordnet in enumerate(labels.ids) if wordnet}
        self._known: dict[str, set[int]] = defaultdict(set)
        for place, (wordnet, label) in enumerate(zip(labels.ids, labels.names, strict=True)):
            bare = label.removeprefix(wordnet)
            for name in (label, bare, bare.partition(",")[0], _without_number(label, labels)):
                self._known[_plain(name)].add(place)
        self._names = labels.names

    def __call__(self, folder: str) -> int:
        """Return the index of the label.

        Raises `ImportRefused`.
        """
        if folder in self._names:  # ImageNet has `Cardigan`, the dog, and `cardigan`, the garment
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
    """Return the label as in the file, before a number made it unique."""
    return next((name for name in labels.renamed if label.startswith(f"{name} (")), label)


# --- predictions ---------------------------------------------------------------------------------


def readable(images: Labelled, geometry: Geometry) -> tuple[Labelled, dict[str, str]]:
    """Return the images that can be decoded, and the reasons for the others by path."""
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
    """Return the predictions of `run` for readable images."""
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
    """Return the rank of the true label, int64 (n,); ties rank by label order, as in the service."""
    order = np.argsort(-said, axis=1, kind="stable")
    ranks: npt.NDArray[np.int64] = (order == targets[:, None]).argmax(axis=1).astype(np.int64)  # (n,)
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
    """Yield the pixels of each image, or the reason why it cannot be decoded."""

    def read(path: Path) -> Pixels | str:
        try:
            return decode_pixels(path.read_bytes(), geometry)
        except RequestError as error:
            return to_one_line(error)
        except OSError as error:
            return error.strerror or to_one_line(error)

    console = Console(stderr=True)
    return iter(
        track(
            map_in_threads(read, images.paths, is_inline=lambda _: False),
            description=f"Checking {len(images)} images",
            total=len(images),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


# --- comparisons ---------------------------------------------------------------------------------


def clearly_better(other: Scores, own: Scores) -> bool:
    """Return whether `other` is better in top-1 or the true label's probability beyond chance.

    The mean paired difference must be at least `_POINTS`, and more than `_ERRORS` of its standard errors.
    """
    pairs = ((other.right, own.right), (other.true.astype(np.float64), own.true.astype(np.float64)))
    return len(own.best) >= _FEWEST and any(_is_more(left - right) for left, right in pairs)


def _is_more(difference: npt.NDArray[np.float64]) -> bool:
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return bool(difference.mean() >= _POINTS and difference.mean() > _ERRORS * error)


def best_of(others: Mapping[str, Scores], own: Scores) -> str | None:
    """Return the best recipe among the clearly better ones; None if there is none."""
    better = {name: one for name, one in others.items() if clearly_better(one, own)}
    return max(better, key=lambda name: (better[name].top1, better[name].true.mean()), default=None)


def loses_nothing(fast: Scores, exact: Scores, scaled: int) -> bool:
    """Return whether no top label changes and `fast` scales enough images to show that."""
    return scaled >= FAST_IMAGES and bool((fast.best == exact.best).all())


def scaled_by_fast(images: Labelled, geometry: Geometry) -> int:
    """Return the number of images that `fast` decodes at a smaller scale.

    Other images, such as small ones and PNGs, say little about `fast`.
    """
    return sum(choose_draft_scale(size, geometry) > 1 for path in images.paths if (size := _jpeg_size(path)))


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return image.size
    except Exception:  # another format
        return None
