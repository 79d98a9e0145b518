"""Images that are in a data set more than once."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.data.perceptual_hash import MAX_DISTANCE, Hashes, find_similar, hash_images
from tests.pictures import draw_picture, encode_image
from tests.training import draw_images


def read_dataset(folder: Path) -> Dataset:
    return load_dataset(folder, size=32, validation=0.3, seed=0)


def draw_parts(folder: Path, *parts: str, count: int = 10) -> Path:
    """`folder/<part>/<label>/<number>.png`: pictures of two labels, no two alike."""
    for number, part in enumerate(parts):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for row in range(count):
                seed = 1000 * number + 2 * row + (label == "dog")
                (folder / part / label / f"{row}.png").write_bytes(
                    encode_image(draw_picture(100, 80, seed), "PNG")
                )
    return folder


# --- the hash ------------------------------------------------------------------------------------


def hash_pictures(*images: Image.Image) -> Hashes:
    return hash_images(np.stack([np.asarray(image.convert("RGB").resize((48, 48))) for image in images]))


def compute_hash_distance(first: Image.Image, second: Image.Image) -> int:
    left, right = hash_pictures(first, second)
    return int(np.bitwise_count(left ^ right))


@pytest.mark.parametrize("seed", range(20))
def test_edited_copies_have_similar_hashes(seed: int) -> None:
    original = draw_picture(160, 160, seed)
    recompressed = Image.open(io.BytesIO(encode_image(original, "JPEG", quality=60)))
    for version in (
        recompressed,
        original.resize((70, 70)),
        ImageEnhance.Brightness(original).enhance(0.9),
        ImageEnhance.Contrast(original).enhance(0.8),
    ):
        assert compute_hash_distance(original, version) <= MAX_DISTANCE


def test_different_pictures_are_not_similar() -> None:
    hashes = hash_pictures(*(draw_picture(128, 128, seed) for seed in range(400)))
    assert len(find_similar(hashes, hashes)) == 400  # each with itself


def test_flat_images_have_no_hash() -> None:
    random = np.random.default_rng(0)
    flat = random.normal(120, 2, (50, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    hashes = hash_images(flat)
    assert not hashes.any()
    assert not len(find_similar(hashes, hashes))
    assert hash_images(random.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)).all()


@pytest.mark.parametrize("limit", [0, 1, 4, 9])
def test_search_finds_the_same_pairs_as_brute_force(limit: int) -> None:
    random = np.random.default_rng(limit)
    seeds = random.integers(1, 2**63, 30).astype(np.uint64)
    flips = np.uint64(1) << random.integers(0, 63, (2, 300, 5)).astype(np.uint64)
    flips *= random.integers(0, 2, flips.shape).astype(np.uint64)  # up to five bits of each
    left, right = (seeds[random.integers(0, 30, 300)] ^ np.bitwise_xor.reduce(flip, axis=1) for flip in flips)
    left[::50] = right[::40][:6] = 0
    is_near = np.bitwise_count(left[:, None] ^ right[None]) <= limit
    is_near &= (left[:, None] != 0) & (right[None] != 0)
    assert is_near.sum() > 5
    assert find_similar(left, right, limit).tolist() == np.argwhere(is_near).tolist()


def test_search_does_not_compare_all_pairs() -> None:
    """The memory shows it: comparing all pairs would take 4 GB."""
    hashes = np.random.default_rng(0).integers(1, 2**63, 60_000).astype(np.uint64)
    hashes[55_000:] = hashes[:5_000] ^ np.uint64(1 << 40)
    tracemalloc.start()
    pairs = find_similar(hashes[:50_000], hashes[50_000:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000
    assert pairs.tolist() == [[row, row + 5_000] for row in range(5_000)]


# --- warnings ------------------------------------------------------------------------------------


def test_data_without_copies_gives_no_warning(tmp_path: Path) -> None:
    assert read_dataset(draw_parts(tmp_path / "set", "train", "test")).warnings == ()
    assert read_dataset(draw_images(tmp_path / "squares", count=10)).warnings == ()


def test_identical_test_images_give_a_warning(tmp_path: Path) -> None:
    folder = draw_parts(tmp_path / "set", "train", "test")
    for row in range(5):
        content = (folder / "train" / "cat" / f"{row}.png").read_bytes()
        (folder / "test" / "cat" / f"{row}.png").write_bytes(content)
    data = read_dataset(folder)
    training_rows = [row for row in range(5) if f"train/cat/{row}.png" in data.train.names]
    assert len(training_rows) > 3
    first_pair = f"train/cat/{training_rows[0]}.png = test/cat/{training_rows[0]}.png"
    (line,) = data.warnings
    assert line.startswith(f"{len(training_rows)} test images are identical to training images, so")
    assert f": {first_pair}, " in line
    assert line.endswith(", …")


@pytest.mark.parametrize("part", ["test", "held-out"])
def test_nearly_identical_image_gives_a_warning(tmp_path: Path, part: str) -> None:
    folder = draw_parts(tmp_path / "set", "train", "test")
    if part == "test":
        held_out_name = "test/cat/3.png"
    else:
        held_out_name = next(name for name in read_dataset(folder).validation.names if "cat" in name)
    training_name = next(name for name in read_dataset(folder).train.names if "cat" in name)
    (folder / held_out_name).write_bytes(encode_image(Image.open(folder / training_name), "JPEG", quality=70))
    expected = (
        f"1 {part} image is nearly identical to training images, so the accuracy looks too good: "
        f"{training_name} = {held_out_name}"
    )
    assert read_dataset(folder).warnings == (expected,)


def test_same_file_under_two_labels_gives_a_warning(tmp_path: Path) -> None:
    folder = draw_parts(tmp_path / "set", "train")
    content = (folder / "train" / "cat" / "2.png").read_bytes()
    (folder / "train" / "dog" / "7.png").write_bytes(content)
    warnings = read_dataset(folder).warnings
    assert warnings[0] == (
        "1 image is also present under other labels, byte for byte: train/cat/2.png = train/dog/7.png"
    )


def test_flat_images_give_no_warning(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label, level in (("dark", 30), ("light", 220)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for row in range(20):
            pixels = random.normal(level, 2, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / label / f"{row}.png")
    assert read_dataset(tmp_path / "set").warnings == ()
