"""The labels of a foreign model, read from a separate file."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_lines import parse_lines
from fovea.export.importer.label_literals import parse_literal
from fovea.export.importer.label_syntax import IdAndLabel


@dataclass(frozen=True)
class Labels:
    """The labels of the graph's outputs."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    """WordNet id of each label; empty if the file has none."""
    shared_names: tuple[str, ...] = ()
    """Labels that several outputs shared, and that now have the output's number as a suffix."""
    notes: tuple[str, ...] = ()
    """Notes on the interpretation of a file that is not simply one label per line."""


def read_labels(path: Path) -> Labels:
    """Read labels from lines, from a JSON or Python list, or from a map.

    A line may have a number before or after the label (`0,tench`, `0: tench`, `tench,0`), which gives the
    index of the output. A WordNet id may come first. A heading is allowed, and lines may be rows of a CSV
    file. A map goes from numbers to labels (`{"0": "tench"}`), from numbers to Keras' pairs
    (`{"0": ["n01440764", "tench"]}`), or from labels to numbers (`{"tench": 0}`). A map may be the `id2label`
    of a larger map. Raises `ImportRefused`.
    """
    text = _read_text(path)
    notes: list[str] = []
    if text.lstrip()[:1] in ("[", "{"):
        pairs = parse_literal(path, text)
    else:
        pairs = parse_lines(path, text, notes)
    return build_labels(path, pairs, notes)


def build_labels(origin: Path | str, pairs: Sequence[IdAndLabel], notes: Sequence[str] = ()) -> Labels:
    """Return labels in the order of the outputs; `origin` names their source in messages.

    Raises `ImportRefused` for labels that cannot be shown or told apart.
    """
    names, notes = [name for _, name in pairs], list(notes)
    if len(names) < 2:
        raise ImportRefused(f"{origin} has {len(names)} labels; at least two are needed")
    for index, name in enumerate(names):
        if not name or not name.isprintable():
            raise ImportRefused(f"{origin}: label {index} is {name!r}, which is empty or not printable")
    unique, shared_names = _make_unique(origin, names)
    notes.extend(_find_similar_labels(unique))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        notes.append("these are placeholders of transformers: no labels were named in training")
    return Labels(unique, tuple(wordnet for wordnet, _ in pairs), shared_names, tuple(notes))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImportRefused(f"cannot read the labels {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ImportRefused(
            f"{path} is not UTF-8 text: save it as UTF-8, with a label on each line"
        ) from None
    if text.lstrip()[:1] == "<" and re.match(r"\s*<(!doctype|html|\?xml|!--)", text, re.IGNORECASE):
        raise ImportRefused(f"{path} is a web page or XML, not a list of labels; download the file itself")
    return text


# --- similar labels ------------------------------------------------------------------------------


def _make_unique(origin: Path | str, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels with a number suffix where several outputs share a label, and the shared labels."""
    normalized_names = [unicodedata.normalize("NFC", name) for name in names]  # é may be one character or two
    counts = Counter(normalized_names)
    unique = tuple(
        f"{one} ({index})" if counts[one] > 1 else name
        for index, (name, one) in enumerate(zip(names, normalized_names, strict=True))
    )
    if len(set(unique)) < len(unique):
        raise ImportRefused(
            f"{origin} has duplicate labels, and labels that already end in a number; rename them"
        )
    return unique, tuple(name for name, count in counts.items() if count > 1)


def _find_similar_labels(names: Sequence[str]) -> Iterator[str]:
    """Yield a note on each group of labels that differ only in case, width or spaces."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for group in groups.values():
        if len(group) > 1:
            yield f"{' and '.join(map(repr, group))} differ only in case or spaces: are they two labels?"


def require_label_count(origin: Path | str, label_count: int, output_count: int) -> None:
    """Raise `ImportRefused` unless there is a label for each of the graph's outputs."""
    if label_count == output_count or (label_count == 2 and output_count == 1):
        return
    sentence = f"{origin} has {label_count} labels, the graph gives {output_count} values for an image"
    if output_count == 1:
        raise ImportRefused(f"{sentence}; one value needs two labels, and is the probability of the second")
    if (label_count, output_count) == (1000, 1001):
        sentence += (
            ": TensorFlow's ImageNet models have a background class first; "
            "add a line such as `background` before the others"
        )
    elif (label_count, output_count) == (1001, 1000):
        sentence += "; TensorFlow's ImageNet lists have a background class first: remove it"
    raise ImportRefused(sentence)
