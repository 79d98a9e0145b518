"""Which images are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fovea.model.data.dataset import load_dataset
from fovea.model.data.split import CONFORMAL, TRAIN, VALIDATION, LabelIndices, split_images
from tests.training import draw_images

PARTS = (TRAIN, VALIDATION, CONFORMAL)


def count_shares(labels: list[LabelIndices], fraction: float, seed: int = 0) -> dict[int, list[int]]:
    """How many images of each label are in each part; no two images are the same."""
    parts = split_images(labels, [bytes([*row.to_bytes(4)]) for row in range(len(labels))], fraction, seed)
    counts = Counter((label, int(part)) for own, part in zip(labels, parts, strict=True) for label in own)
    return {
        label: [counts[label, part] for part in PARTS] for label in sorted({x for own in labels for x in own})
    }


@pytest.mark.parametrize(
    ("images", "fraction", "expected"),
    [
        (2, 0.1, [1, 1, 0]),
        (2, 0.5, [1, 1, 0]),
        (3, 0.5, [1, 1, 1]),
        (5, 0.2, [4, 1, 0]),
        (100, 0.1, [90, 5, 5]),
        (1001, 0.3, [701, 150, 150]),
    ],
)
def test_every_label_has_its_share_of_every_part(images: int, fraction: float, expected: list[int]) -> None:
    labels: list[LabelIndices] = [*((row % 3,) for row in range(3 * images)), *[(3,)] * 40]
    found = count_shares(labels, fraction)
    assert [found[label] for label in range(3)] == [expected] * 3


@pytest.mark.parametrize("seed", range(20))
def test_labels_that_come_together_have_nearly_their_share(seed: int) -> None:
    """Rare ones to the image; of two labels an image, or none, none is more than a few off."""
    random = np.random.default_rng(seed)
    chances = np.array([0.5, 0.3, 0.1, 0.02])
    labels = [tuple(np.flatnonzero(random.random(4) < chances).tolist()) for _ in range(2000)]
    found = count_shares(labels, 0.2, seed)
    for counts in found.values():
        total = sum(counts)
        assert np.abs(np.array(counts) - total * np.array([0.8, 0.1, 0.1])).max() <= max(3, 0.02 * total)
    parts = split_images(labels, [row.to_bytes(4) for row in range(2000)], 0.2, seed)
    without = Counter(int(part) for own, part in zip(labels, parts, strict=True) if not own)
    assert without[TRAIN] == pytest.approx(0.8 * without.total(), abs=2)


@pytest.mark.parametrize("seed", range(300))
def test_every_label_of_two_images_is_trained_on(seed: int) -> None:
    """And validated too, wherever that takes nothing from training."""
    random = np.random.default_rng(seed)
    labels = [
        tuple(sorted(random.choice(6, random.integers(1, 4), replace=False).tolist())) for _ in range(9)
    ]
    counts = Counter(label for own in labels for label in own)
    for label, (trained, validated, _) in count_shares(labels, 0.4, seed).items():
        assert trained >= 1
        if counts[label] > 6:
            assert validated >= 1


def test_what_would_take_a_labels_last_image_from_training_is_mended() -> None:
    """By the rarest first, images 1 and 3 are held out, and with them all of label 2."""
    labels: list[LabelIndices] = [(0,), (0, 2), (1,), (1, 2)]
    found = [count_shares(labels, 0.5, seed) for seed in range(50)]
    assert all(trained >= 1 for shared in found for trained, _, _ in shared.values())


def test_copies_stay_together() -> None:
    labels: list[LabelIndices] = [(row % 2,) for row in range(60)]
    digests = [bytes([row % 2, row // 6]) for row in range(60)]
    for seed in range(20):
        parts = split_images(labels, digests, 0.3, seed)
        where: dict[bytes, set[int]] = {}
        for digest, part in zip(digests, parts, strict=True):
            where.setdefault(digest, set()).add(int(part))
        assert {len(found) for found in where.values()} == {1}
        assert sorted(Counter(parts.tolist()).items()) == [(TRAIN, 42), (VALIDATION, 12), (CONFORMAL, 6)]


def test_many_copies_leave_room_for_the_others() -> None:
    """Eight of one image go where eight are wanted, whatever the seed has come first."""
    digests = [b"same"] * 8 + [bytes([row]) for row in range(8)]
    for seed in range(20):
        counts = Counter(split_images([(0,)] * 16, digests, 0.25, seed).tolist())
        assert counts == {TRAIN: 12, VALIDATION: 2, CONFORMAL: 2}


def test_what_is_validated_at_least_is_the_image_with_the_fewest_copies() -> None:
    digests = [b"many"] * 5 + [b"few"] * 3
    for seed in range(20):
        assert split_images([(0,)] * 8, digests, 0.1, seed).tolist() == [TRAIN] * 5 + [VALIDATION] * 3


def test_copies_of_one_image_alone_are_all_trained_on() -> None:
    labels: list[LabelIndices] = [(row // 5,) for row in range(10)]
    digests = [b"same"] * 5 + [bytes([row]) for row in range(5)]
    parts = split_images(labels, digests, 0.2, 0)
    assert parts[:5].tolist() == [TRAIN] * 5
    assert Counter(parts[5:].tolist()) == {TRAIN: 4, VALIDATION: 1}


def test_copies_of_files_do_not_leak(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", count=6)
    for number in range(6):
        for copy in range(2):
            content = (folder / "red" / f"{number}.png").read_bytes()
            (folder / "red" / f"{number}-{copy}.png").write_bytes(content)
    for seed in range(10):
        data = load_dataset(folder, size=16, validation=0.4, seed=seed)
        held = {*data.validation.names, *data.conformal.names}
        assert not {name[:5] for name in held} & {name[:5] for name in data.train.names if "red" in name}
        assert not [line for line in data.warnings if "byte for byte" in line]


def test_the_split_is_the_seeds_and_the_names_alone() -> None:
    labels: list[LabelIndices] = [(row % 2,) for row in range(100)]
    digests = [row.to_bytes(4) for row in range(100)]
    first = split_images(labels, digests, 0.3, 5).tolist()
    assert split_images(labels, digests[::-1], 0.3, 5).tolist() == first
    assert split_images(labels, digests, 0.3, 6).tolist() != first
