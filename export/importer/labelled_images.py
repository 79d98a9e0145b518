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
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from fovea.export.importer.check_result import MIN_FAST_IMAGES
from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import Labels
from fovea.export.importer.label_syntax import WORDNET_ID
from fovea.model.data.choices import Choices
from fovea.model.data.decoding import decode_pixels, map_in_threads
from fovea.model.data.disk_source import Folder
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File
from fovea.service.artifact.contract import Geometry
from fovea.service.errors import RequestError, to_one_line
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.engine import Floats
from fovea.service.inference.pixels import Pixels, brightness_of

RECIPE_IMAGE_COUNT: Final = 200
"""Number of images on which other recipes are tried, spread over all images."""

_CHUNK_SIZE: Final = 16
"""Number of images that are decoded and run together."""

_TOP_K: Final = 5

_MIN_STANDARD_ERRORS: Final = 2.0
"""Number of standard errors of the mean paired difference by which another recipe must be better."""

_MIN_IMPROVEMENT: Final = 0.03
"""Minimum improvement in top-1 or in the true label's mean probability.

Slightly more or less of the image's border alone changes both by one or two percentage points.
"""

_MIN_IMAGES: Final = 8
"""Minimum number of images; fewer images distinguish recipes only by chance."""

PredictPixels = Callable[[Pixels], tuple[Floats, Floats]]
"""Function from pixels, uint8 (n, H, W, 3), to probabilities, float32 (n, labels), and known scores, float32
(n,)."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with known labels."""

    name: str
    paths: tuple[Path, ...]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> LabelledImages:
        """Return the images at `rows`."""
        return LabelledImages(self.name, tuple(self.paths[row] for row in rows), self.targets[rows])

    @property
    def sample_rows(self) -> npt.NDArray[np.int64]:
        """Rows of at most `RECIPE_IMAGE_COUNT` images, spread over all images."""
        return np.unique(np.linspace(0, len(self) - 1, min(RECIPE_IMAGE_COUNT, len(self))).astype(np.int64))


@dataclass(frozen=True)
class Scores:
    """The predictions of a model for labelled images, one row each."""

    top_label: npt.NDArray[np.int64]
    """Index of the most probable label, int64 (n,)."""
    confidence: Floats
    """Probability of the most probable label, float32 (n,)."""
    true_probability: Floats
    """Probability of the true label, float32 (n,)."""
    rank: npt.NDArray[np.int64]
    """Number of labels that are more probable than the true label, int64 (n,)."""
    brightness: Floats
    probabilities: Floats
    known_scores: Floats
    """Likeness to the training images (`service.inference.known`), float32 (n,)."""

    @property
    def hits(self) -> npt.NDArray[np.float64]:
        """1 where the most probable label is true, else 0; float64 (n,)."""
        hits: npt.NDArray[np.float64] = (self.rank == 0).astype(np.float64)
        return hits

    @property
    def top1(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return float(self.hits.mean())

    @property
    def top5(self) -> float:
        """Top-5 accuracy, 0 to 1."""
        return float((self.rank < _TOP_K).mean())

    def select(self, rows: npt.NDArray[np.int64]) -> Scores:
        """Return the scores at `rows`."""
        return Scores(**{name: values[rows] for name, values in vars(self).items()})


# --- matching of folders and labels --------------------------------------------------------------


def load_labelled_images(folder: Path, labels: Labels, option: str = "--check") -> LabelledImages:
    """Return the images in sub-folders that are named by label.

    `option` is the option that names the folder. Raises `ImportRefused`.
    """
    if not folder.is_dir():
        raise ImportRefused(
            f"{option} {folder} is not a folder; it takes a folder with a sub-folder of images for each label"
        )
    source, files = _list_files(folder)
    if not files:
        raise ImportRefused(f"{option} {folder} has no sub-folder with images in it")
    find_label = LabelLookup(labels, option)
    index_by_folder = {name: find_label(name) for name in sorted({file.labels[0] for file in files})}
    targets = np.array([index_by_folder[file.labels[0]] for file in files], np.int64)
    return LabelledImages(source.name, tuple(source.resolve_paths(file.name for file in files)), targets)


def _list_files(folder: Path) -> tuple[Folder, tuple[File, ...]]:
    """Return the labelled images of a folder.

    If the folders below are ambiguous, the sub-folders are the labels, as the help of the options says.
    """
    source = Folder(folder)
    try:
        return source, source.list_files()
    except DataError:
        source = Folder(folder, Choices(label_depth=1))
        return source, source.list_files()


class LabelLookup:
    """A lookup of the label for a folder name."""

    def __init__(self, labels: Labels, option: str = "--check") -> None:
        self._option = option
        self._index_by_id = {wordnet: index for index, wordnet in enumerate(labels.ids) if wordnet}
        self._indices_by_name: dict[str, set[int]] = defaultdict(set)
        for index, (wordnet, label) in enumerate(zip(labels.ids, labels.names, strict=True)):
            bare_label = label.removeprefix(wordnet)
            for name in (label, bare_label, bare_label.partition(",")[0], _strip_number(label, labels)):
                self._indices_by_name[_normalize_name(name)].add(index)
        self._labels = labels.names

    def __call__(self, folder: str) -> int:
        """Return the index of the label.

        Raises `ImportRefused`.
        """
        if folder in self._labels:  # ImageNet has `Cardigan`, the dog, and `cardigan`, the garment
            return self._labels.index(folder)
        id_match = WORDNET_ID.match(folder)
        if id_match and id_match[0] in self._index_by_id:
            return self._index_by_id[id_match[0]]
        indices = self._indices_by_name.get(_normalize_name(folder)) or self._indices_by_name.get(
            _normalize_name(WORDNET_ID.sub("", folder, count=1))
        )
        if not indices:
            raise ImportRefused(self._describe_unknown(folder))
        if len(indices) > 1:
            several = ", ".join(repr(self._labels[index]) for index in sorted(indices))
            raise ImportRefused(
                f"{self._option}: the folder {folder!r} fits several labels: {several}; use one of these"
            )
        return next(iter(indices))

    def _describe_unknown(self, folder: str) -> str:
        prefix = f"{self._option}: the folder {folder!r} is"
        if WORDNET_ID.fullmatch(folder) and not self._index_by_id:
            return f"{prefix} a WordNet id, but the labels have no ids; name the folder after its label"
        nearest = difflib.get_close_matches(
            _normalize_name(folder), [name for name in self._indices_by_name if name], 1, 0
        )
        label = self._labels[min(self._indices_by_name[nearest[0]])] if nearest else self._labels[0]
        return f"{prefix} not a label; the nearest is {label!r}"


def _normalize_name(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFC", name).casefold())).strip()


def _strip_number(label: str, labels: Labels) -> str:
    """Return the label as in the file, before a number made it unique."""
    return next((name for name in labels.shared_names if label.startswith(f"{name} (")), label)


# --- predictions ---------------------------------------------------------------------------------


def filter_readable(images: LabelledImages, geometry: Geometry) -> tuple[LabelledImages, dict[str, str]]:
    """Return the images that can be decoded, and the reasons for the others by path."""
    unreadable: dict[str, str] = {}
    rows = []
    for row, pixels in enumerate(_decode_images(images, geometry)):
        if isinstance(pixels, str):
            unreadable[str(images.paths[row])] = pixels
        else:
            rows.append(row)
    if not rows:
        raise ImportRefused(f"none of the {len(images)} images in {images.name} can be read")
    return images.select(rows), unreadable


def score_images(predict: PredictPixels, images: LabelledImages, geometry: Geometry) -> Scores:
    """Return the predictions of `predict` for readable images."""
    parts = []
    for pixels in _stack_chunks(_decode_images(images, geometry)):
        parts.append((*predict(pixels), brightness_of(pixels)))
    probabilities, known_scores, brightness = (np.concatenate(values) for values in zip(*parts, strict=True))
    true_probability = probabilities[np.arange(len(images)), images.targets]
    return Scores(
        top_label=probabilities.argmax(axis=1).astype(np.int64),
        confidence=probabilities.max(axis=1),
        true_probability=true_probability,
        rank=_rank_true_labels(probabilities, images.targets),
        brightness=brightness,
        probabilities=probabilities,
        known_scores=known_scores,
    )


def _rank_true_labels(probabilities: Floats, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rank of the true label, int64 (n,); ties rank by label order, as in the service."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranks: npt.NDArray[np.int64] = (order == targets[:, None]).argmax(axis=1).astype(np.int64)  # (n,)
    return ranks


def _stack_chunks(decoded_images: Iterator[Pixels | str]) -> Iterator[Pixels]:
    chunk: list[Pixels] = []
    for pixels in decoded_images:
        if isinstance(pixels, str):
            raise ImportRefused(f"an image of --check could be read once, and now cannot: {pixels}")
        chunk.append(pixels)
        if len(chunk) == _CHUNK_SIZE:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def decode_or_explain(path: Path, geometry: Geometry) -> Pixels | str:
    """Return the pixels of an image file, or the reason why it cannot be decoded.

    Never raises for a bad file: in the threads of `map_in_threads`, an exception would end everything.
    """
    try:
        return decode_pixels(path.read_bytes(), geometry)
    except RequestError as error:
        return to_one_line(error)
    except OSError as error:
        return error.strerror or to_one_line(error)


def _decode_images(images: LabelledImages, geometry: Geometry) -> Iterator[Pixels | str]:
    """Yield the pixels of each image, or the reason why it cannot be decoded, in the order of the paths."""
    decode_file = partial(decode_or_explain, geometry=geometry)
    console = Console(stderr=True)
    return iter(
        track(
            map_in_threads(decode_file, images.paths, is_inline=lambda _: False),
            description=f"Checking {len(images)} images",
            total=len(images),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


# --- comparisons ---------------------------------------------------------------------------------


def is_clearly_better(other: Scores, own_scores: Scores, *, hits_alone: bool = False) -> bool:
    """Return whether `other` is better in top-1 or the true label's probability beyond chance.

    With `hits_alone` only top-1 counts, because the probabilities cannot be compared.
    The mean paired difference must be at least `_MIN_IMPROVEMENT`, and more than `_MIN_STANDARD_ERRORS` of
    its standard errors.
    """
    pairs = (
        (other.hits, own_scores.hits),
        (other.true_probability.astype(np.float64), own_scores.true_probability.astype(np.float64)),
    )
    return len(own_scores.top_label) >= _MIN_IMAGES and any(
        _is_significant(left - right) for left, right in pairs[: 1 if hits_alone else 2]
    )


def _is_significant(difference: npt.NDArray[np.float64]) -> bool:
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return bool(difference.mean() >= _MIN_IMPROVEMENT and difference.mean() > _MIN_STANDARD_ERRORS * error)


def choose_best_recipe(
    others: Mapping[str, Scores], own_scores: Scores, wider: Set[str] = frozenset()
) -> str | None:
    """Return the best recipe among the clearly better ones; None if there is none.

    `wider` are recipes with a much wider range of values, such as 0 … 255. A network makes larger logits of
    larger values, so that its answers are more certain without being better.
    """
    better = {
        name: one
        for name, one in others.items()
        if is_clearly_better(one, own_scores, hits_alone=name in wider)
    }
    return max(
        better,
        key=lambda name: (better[name].top1, name not in wider, better[name].true_probability.mean()),
        default=None,
    )


def is_lossless(fast: Scores, exact: Scores, scaled_count: int) -> bool:
    """Return whether no top label changes and `fast` scales enough images to show that."""
    return scaled_count >= MIN_FAST_IMAGES and bool((fast.top_label == exact.top_label).all())


def count_scaled_by_fast(images: LabelledImages, geometry: Geometry) -> int:
    """Return the number of images that `fast` decodes at a smaller scale.

    Other images, such as small ones and PNGs, say little about `fast`.
    """
    return sum(
        choose_draft_scale(size, geometry) > 1 for path in images.paths if (size := _read_jpeg_size(path))
    )


def _read_jpeg_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return image.size
    except Exception:  # another format
        return None
