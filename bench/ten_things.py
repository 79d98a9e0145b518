"""The training set of the default model: the ten labels of CIFAR-10, in small pictures and in photographs.

`python -m fovea.bench.ten_things OUT.tar` joins CIFAR-10 (JPEG files) with the classes of Tiny ImageNet that
show one of its labels, and with a folder `other` of the classes that show none. Twenty of these are kept
from training, so that `make bench-known` asks about things that the model has never seen.

Each photograph of a label is there twice, because small pictures are six times as many.

Held out for calibration are 1,000 training images of CIFAR-10 and all validation images of Tiny ImageNet, so
that probabilities hold for photographs as for small pictures. The test images are those of CIFAR-10.
"""

from __future__ import annotations

import argparse
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fovea.bench.known import CIFAR10_FILE, OTHER_CLASSES, TINY_IMAGENET_FILE

OTHER_LABEL: Final = "other"

CLASSES: Final = {
    "automobile": ("beach_wagon", "convertible", "limousine"),
    "bird": ("albatross", "black_stork", "goose", "king_penguin"),
    "cat": ("Egyptian_cat", "Persian_cat", "tabby"),
    "dog": (
        "Chihuahua",
        "German_shepherd",
        "Labrador_retriever",
        "Yorkshire_terrier",
        "golden_retriever",
        "standard_poodle",
    ),
    "frog": ("bullfrog", "tailed_frog"),
    "ship": ("gondola",),
    "truck": ("moving_van",),
}
"""Classes of Tiny ImageNet by their label. It has no airplane, deer or horse, and of ships only gondolas."""

_UNCLEAR_CLASSES: Final = frozenset({"police_van", "gazelle"})
"""Classes that are left out: a police van is an automobile or a truck, and a gazelle resembles a deer."""

_CIFAR10_HELD_OUT: Final = 100
"""Images of each label of CIFAR-10 that are held out."""

_OTHER_IMAGES: Final = 225
"""Training images of each class of other things."""


def main() -> None:
    """Write the archive and print the number of images in each folder."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.ten_things", description=__doc__)
    parser.add_argument("out", type=Path, help="archive to write")
    for folder, count in sorted(write_archive(parser.parse_args().out).items()):
        print(f"{count:>6} {folder}")


def write_archive(out: Path) -> Counter[str]:
    """Write the archive, and return the number of images in each folder."""
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w") as archive:
        for members in (_list_cifar10(), _list_tiny_imagenet()):
            for path, member, content in members:
                counts[str(Path(path).parent)] += 1
                info = tarfile.TarInfo(f"ten-things/{path}")
                info.size = member.size
                archive.addfile(info, content.extractfile(member))
    return counts


_Members = Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]


def _list_cifar10() -> _Members:
    """Yield the new path of each image of CIFAR-10, with its place in the archive."""
    seen: Counter[str] = Counter()
    with tarfile.open(CIFAR10_FILE) as archive:
        for member in archive:
            part, label, *_ = (*Path(member.name).parts[1:-1], "", "")
            if not member.isfile():
                continue
            if part == "train":
                seen[label] += 1
                part = "val" if seen[label] <= _CIFAR10_HELD_OUT else "train"
            yield f"{part}/{label}/{Path(member.name).name}", member, archive


def _list_tiny_imagenet() -> _Members:
    """Yield the new path of each image of Tiny ImageNet that is used, with its place in the archive.

    Training images of a label have two paths.
    """
    labels = {name: label for label, names in CLASSES.items() for name in names}
    seen: Counter[str] = Counter()
    with tarfile.open(TINY_IMAGENET_FILE) as archive:
        for member in archive:
            part, name, *_ = (*Path(member.name).parts[1:-1], "", "")
            if not member.isfile() or name in _UNCLEAR_CLASSES:
                continue
            label = labels.get(name, OTHER_LABEL)
            if label == OTHER_LABEL:
                seen[f"{part}/{name}"] += 1
                is_trained = name not in OTHER_CLASSES
                if is_trained == (part == "val") or seen[f"{part}/{name}"] > _OTHER_IMAGES:
                    continue
            yield f"{part}/{label}/{Path(member.name).name}", member, archive
            if part == "train" and label != OTHER_LABEL:
                yield f"{part}/{label}/again-{Path(member.name).name}", member, archive


if __name__ == "__main__":
    main()
