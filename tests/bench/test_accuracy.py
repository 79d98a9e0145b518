"""The table of accuracies: each row from the runs of its own command."""

from __future__ import annotations

from pathlib import Path

import pytest

from fovea.bench import accuracy
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS_FILE
from tests.training import draw_images


@pytest.mark.long
def test_table_row_is_trained_once_per_seed_and_formatted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "DATA_FILE", draw_images(tmp_path / "squares", count=12, side=16))
    monkeypatch.setattr(accuracy, "RUNS_FOLDER", tmp_path / "runs")
    teacher = accuracy.TableRow("cnn", 2)
    row = accuracy.TableRow("cnn", 3, (teacher,))
    runs = [accuracy._finish_run(row, seed) for seed in (0, 1)]
    accuracies = [100 * run["measured"]["accuracy"] for run in runs]
    assert [run["recipe"]["seed"] for run in runs] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "cnn-2-0", "cnn-2-1", "cnn-3-taught-0", "cnn-3-taught-1",
    ]  # fmt: skip
    modified_at = (row.run_folder(0) / WEIGHTS_FILE).stat().st_mtime_ns
    assert (
        accuracy._finish_run(row, 0) == checkpoint.load_metadata(row.run_folder(0), WEIGHTS_FILE) == runs[0]
    )
    assert (row.run_folder(0) / WEIGHTS_FILE).stat().st_mtime_ns == modified_at

    network, parameters, milliseconds, accuracy_text, run_count, _minutes, command = accuracy._format_row(
        row, runs
    )[2:-2].split(" | ")
    assert (network, parameters, run_count) == ("`cnn`, taught by `cnn`", "1.97 million", "2")
    assert accuracy_text.startswith(
        f"{sum(accuracies) / 2:.2f} ± {abs(accuracies[0] - accuracies[1]) / 2**0.5:.2f} %"
    )
    assert 0.05 < float(milliseconds) < 100
    assert command == f"`fovea {' '.join(row.train_command(0))}`"
