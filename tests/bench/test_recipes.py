"""The changes of the training recipe: each one trains, and changes what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fovea.bench import recipes
from fovea.bench.recipes import VARIANTS, Variant
from fovea.model.data.dataset import Dataset
from tests.training import draw_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return draw_dataset(tmp_path_factory.mktemp("set"), count=24)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variant_trains(
    variant: Variant, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "RUNS_FOLDER", tmp_path)
    result = recipes._train_variant(variant, data, seed=0, epochs=1)
    assert 0 <= result["accuracy"] <= 1
    assert result["seconds"] > 0


def make_batch() -> tuple[Tensor, Tensor, torch.Generator]:
    """Return random pixels with the shares of two labels, and a generator."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (16, 8, 8, 3), generator=generator).to(torch.uint8)
    shares = torch.nn.functional.one_hot(torch.arange(16) % 2, 2).float()
    return pixels, shares, generator


def test_mixed_labels_have_the_share_of_their_pixels() -> None:
    pixels, shares, generator = make_batch()
    for mix in (recipes.mix_images, recipes.paste_pieces):
        mixed, mixed_shares = mix(pixels, shares, generator)
        assert mixed.shape == pixels.shape and mixed.dtype == torch.uint8
        assert torch.allclose(mixed_shares.sum(dim=1), torch.ones(16))
    colours = torch.zeros(16, 8, 8, 3, dtype=torch.uint8)
    colours[1::2] = 200  # the second label is bright
    pasted, pasted_shares = recipes.paste_pieces(colours, shares, generator)
    assert torch.allclose((pasted == 200).float().mean(dim=(1, 2, 3)), pasted_shares[:, 1], atol=1e-5)


def test_every_way_of_changing_an_image_does_nothing_at_zero() -> None:
    pixels, _, _ = make_batch()
    planes = pixels.permute(0, 3, 1, 2).float()
    for change in recipes._WAYS:
        assert torch.allclose(change(planes, torch.zeros(16, 1, 1, 1)), planes, atol=1e-2)
        strong = change(planes, torch.full((16, 1, 1, 1), 0.9))
        assert strong.shape == planes.shape


def test_table_row_compares_with_the_first() -> None:
    base = [{"accuracy": 0.90, "seconds": 10.0}, {"accuracy": 0.92, "seconds": 10.0}]
    runs = [{"accuracy": 0.93, "seconds": 15.0}, {"accuracy": 0.93, "seconds": 25.0}]
    row = recipes._format_row(VARIANTS[4], runs, base)
    assert row == "| mixup | timm | 93.00 ± 0.00 % | +2.00 | 2.00 | 2 |"


def test_finished_run_is_read_from_its_file(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "RUNS_FOLDER", tmp_path)
    (tmp_path / "mixup-10-1.json").write_text(json.dumps({"accuracy": 0.5, "seconds": 1.0}))
    assert recipes._finish_run(VARIANTS[4], data, 1, 10) == {"accuracy": 0.5, "seconds": 1.0}
