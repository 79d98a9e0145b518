"""The accuracy of the networks on CIFAR-10 (JPEG files): `make bench-accuracy`, hours on two cores.

Each row of the table is a `fovea train` command, run for each seed in its own folder. A finished run is read
from its folder, and an interrupted run is resumed. Accuracy is measured once on the test images at the end of
a run. Milliseconds are those of the graph in ONNX Runtime, batch 1, on one core. Minutes are those of
training steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch

from fovea.export.from_checkpoint import export_graph
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS_FILE
from fovea.model.training.provenance import describe_hardware

DATA_FILE: Final = Path(os.environ.get("TEST_DATA", "data")) / "cifar10-jpeg.tar.gz"
RUNS_FOLDER: Final = Path("runs/accuracy")
CALL_COUNT: Final = 300
"""Number of calls of the graph; the fastest third shows the machine's speed without disturbance."""


@dataclass(frozen=True)
class TableRow:
    """A network with its number of epochs and its teachers."""

    net: str
    epochs: int
    teachers: tuple[TableRow, ...] = ()
    seed_count: int = 1
    """Number of runs with different seeds."""

    def run_folder(self, seed: int) -> Path:
        """Return the folder of the run with this seed."""
        suffix = "-taught" if self.teachers else ""
        return RUNS_FOLDER / f"{self.net}-{self.epochs}{suffix}-{seed}"

    def train_command(self, seed: int) -> list[str]:
        """Return the command of the run; teachers have the same seed and the same held-out images."""
        teacher_options = [word for one in self.teachers for word in ("--teacher", str(one.run_folder(seed)))]
        return [
            "train", "--data", str(DATA_FILE), "--net", self.net, "--epochs", str(self.epochs),
            *teacher_options, "--seed", str(seed), "--out", str(self.run_folder(seed)),
        ]  # fmt: skip


SMALL: Final = TableRow("cnn", 20, seed_count=3)
LARGE: Final = TableRow("cnn_large", 30)
ROWS: Final = (SMALL, LARGE, TableRow("cnn", 56, (LARGE, SMALL)))
"""The default settings, a larger network, and the default model of the zoo, taught by both."""


def main() -> None:
    """Train the missing runs, measure, and print a Markdown table."""
    options = _parse_arguments()
    print(f"{describe_hardware()}\n")
    print("| network | parameters | ms on one core | test accuracy | n | minutes | command |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS if options.row is None else [ROWS[options.row]]:
        print(
            _format_row(row, [_finish_run(row, seed) for seed in range(options.seeds or row.seed_count)]),
            flush=True,
        )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, help="runs of each row (default: those of the table)")
    parser.add_argument(
        "--row", type=int, choices=range(len(ROWS)), help="row of the table to measure (default: all)"
    )
    return parser.parse_args()


def _finish_run(row: TableRow, seed: int) -> dict[str, Any]:
    """Return the metadata of the run, after finishing it if needed."""
    metadata = load_run_metadata(row.run_folder(seed))
    if "measured" not in metadata:
        for teacher in row.teachers:
            _finish_run(teacher, seed)
        command = [sys.executable, "-m", "fovea", *row.train_command(seed), "--resume"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        metadata = load_run_metadata(row.run_folder(seed))
    return metadata


def load_run_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a run's weights; empty if there are none yet."""
    return checkpoint.load_metadata(folder, WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else {}


def _format_row(row: TableRow, runs: list[dict[str, Any]]) -> str:
    accuracies = [100 * run["measured"]["accuracy"] for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    minutes = (
        statistics.mean(sum(epoch["seconds"] for epoch in run["progress"]["history"]) for run in runs) / 60
    )
    names = " and ".join(f"`{teacher.net}`" for teacher in row.teachers)
    teacher_note = f", taught by {names}" if names else ""
    parameter_count = f"{runs[0]['parameters'] / 1e6:.2f} million"
    return (
        f"| `{row.net}`{teacher_note} | {parameter_count} | {_measure_milliseconds(row):.1f} "
        f"| {statistics.mean(accuracies):.2f}{spread} % | {len(runs)} | {minutes:.0f} "
        f"| `fovea {' '.join(row.train_command(0))}` |"
    )


def _measure_milliseconds(row: TableRow) -> float:
    """Return the time for one image on one core, in ms: the median of the fastest third of the calls."""
    net = checkpoint.load_checkpoint(row.run_folder(0)).build_net().eval()
    side = net.config.size
    graph = export_graph(net, torch.zeros(2, side, side, 3, dtype=torch.uint8), ["logits"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8).numpy()
    durations = sorted(
        _measure_seconds(lambda: session.run(None, {"pixels": pixels})) for _ in range(CALL_COUNT)
    )
    return 1e3 * statistics.median(durations[: CALL_COUNT // 3])


def _measure_seconds(call: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
