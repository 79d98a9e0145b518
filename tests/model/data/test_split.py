"""The split of images into training and held-out parts."""

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
    """Count the images of each label in each part, for images of which no two are the same."""
    parts = split_images(labels, [bytes([*row.to_bytes(4)]) for row in range(len(labels))], fraction, seed)
    counts = Counter(
        (label, int(part)) for image_labels, part in zip(labels, parts, strict=True) for label in image_labels
    )
    return {
        label: [counts[label, part] for part in PARTS]
        for label in sorted({label for image_labels in labels for label in image_labels})
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
    shares = count_shares(labels, fraction)
    assert [shares[label] for label in range(3)] == [expected] * 3


@pytest.mark.parametrize("seed", range(20))
def test_multilabel_split_keeps_shares_within_tolerance(seed: int) -> None:
    """Each part is off by at most three images or 2% of the label, also for images without a label."""
    random = np.random.default_rng(seed)
    chances = np.array([0.5, 0.3, 0.1, 0.02])
    labels = [tuple(np.flatnonzero(random.random(4) < chances).tolist()) for _ in range(2000)]
    shares = count_shares(labels, 0.2, seed)
    for counts in shares.values():
        total = sum(counts)
        assert np.abs(np.array(counts) - total * np.array([0.8, 0.1, 0.1])).max() <= max(3, 0.02 * total)
    parts = split_images(labels, [row.to_bytes(4) for row in range(2000)], 0.2, seed)
    unlabelled_counts = Counter(
        int(part) for image_labels, part in zip(labels, parts, strict=True) if not image_labels
    )
    assert unlabelled_counts[TRAIN] == pytest.approx(0.8 * unlabelled_counts.total(), abs=2)


@pytest.mark.parametrize("seed", range(300))
def test_every_label_keeps_a_training_image(seed: int) -> None:
    """A label of more than six images also keeps a validation image."""
    random = np.random.default_rng(seed)
    labels = [
        tuple(sorted(random.choice(6, random.integers(1, 4), replace=False).tolist())) for _ in range(9)
    ]
    counts = Counter(label for image_labels in labels for label in image_labels)
    for label, (training_count, validation_count, _) in count_shares(labels, 0.4, seed).items():
        assert training_count >= 1
        if counts[label] > 6:
            assert validation_count >= 1


def test_split_never_holds_out_a_whole_label() -> None:
    """A split by the rarest label first would hold out images 1 and 3, and with them all of label 2."""
    labels: list[LabelIndices] = [(0,), (0, 2), (1,), (1, 2)]
    shares_by_seed = [count_shares(labels, 0.5, seed) for seed in range(50)]
    assert all(training_count >= 1 for shares in shares_by_seed for training_count, _, _ in shares.values())


def test_copies_stay_in_one_part() -> None:
    labels: list[LabelIndices] = [(row % 2,) for row in range(60)]
    digests = [bytes([row % 2, row // 6]) for row in range(60)]
    for seed in range(20):
        parts = split_images(labels, digests, 0.3, seed)
        parts_by_digest: dict[bytes, set[int]] = {}
        for digest, part in zip(digests, parts, strict=True):
            parts_by_digest.setdefault(digest, set()).add(int(part))
        assert {len(copy_parts) for copy_parts in parts_by_digest.values()} == {1}
        assert sorted(Counter(parts.tolist()).items()) == [(TRAIN, 42), (VALIDATION, 12), (CONFORMAL, 6)]


def test_many_copies_do_not_displace_other_images() -> None:
    """The eight copies of one image are trained on as a whole, with every seed."""
    digests = [b"same"] * 8 + [bytes([row]) for row in range(8)]
    for seed in range(20):
        counts = Counter(split_images([(0,)] * 16, digests, 0.25, seed).tolist())
        assert counts == {TRAIN: 12, VALIDATION: 2, CONFORMAL: 2}


def test_image_with_the_fewest_copies_is_validated() -> None:
    digests = [b"many"] * 5 + [b"few"] * 3
    for seed in range(20):
        assert split_images([(0,)] * 8, digests, 0.1, seed).tolist() == [TRAIN] * 5 + [VALIDATION] * 3


def test_label_with_one_distinct_image_is_only_trained_on() -> None:
    labels: list[LabelIndices] = [(row // 5,) for row in range(10)]
    digests = [b"same"] * 5 + [bytes([row]) for row in range(5)]
    parts = split_images(labels, digests, 0.2, 0)
    assert parts[:5].tolist() == [TRAIN] * 5
    assert Counter(parts[5:].tolist()) == {TRAIN: 4, VALIDATION: 1}


def test_copied_files_do_not_leak_between_parts(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", count=6)
    for number in range(6):
        for copy in range(2):
            content = (folder / "red" / f"{number}.png").read_bytes()
            (folder / "red" / f"{number}-{copy}.png").write_bytes(content)
    for seed in range(10):
        data = load_dataset(folder, size=16, validation=0.4, seed=seed)
        held_out_names = {*data.validation.names, *data.conformal.names}
        assert not {name[:5] for name in held_out_names} & {
            name[:5] for name in data.train.names if "red" in name
        }
        assert not [warning for warning in data.warnings if "byte for byte" in warning]


def test_split_depends_on_the_seed_but_not_on_digests() -> None:
    labels: list[LabelIndices] = [(row % 2,) for row in range(100)]
    digests = [row.to_bytes(4) for row in range(100)]
    first = split_images(labels, digests, 0.3, 5).tolist()
    assert split_images(labels, digests[::-1], 0.3, 5).tolist() == first
    assert split_images(labels, digests, 0.3, 6).tolist() != first
