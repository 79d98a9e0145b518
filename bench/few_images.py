"""The gain of the backbone with few images: `make bench-few-images`, 10 minutes on two cores.

Each run is `fovea train` with its defaults on 50 images of each label of CIFAR-10 (JPEG files), which the
backbone has never seen, and is measured on all test images. The seed chooses the images, too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Final

from fovea.bench.accuracy import load_run_metadata
from fovea.bench.known import CIFAR10_FILE
from fovea.model.networks.backbone import BACKBONE, SCRATCH
from fovea.model.training.provenance import describe_hardware

RUNS_FOLDER: Final = Path("runs/few-images")
IMAGES: Final = 50
"""Training images of each label."""


def main() -> None:
    """Train the missing runs, and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.few_images", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    seeds = range(parser.parse_args().seeds)
    print(f"{describe_hardware()}\n")
    print("| `--from` | network, input | test accuracy | n | minutes |\n|---|---|---|---|---|")
    for start in (SCRATCH, BACKBONE):
        print(_format_row(start, [_finish_run(start, seed) for seed in seeds]), flush=True)


def write_few_images(out: Path, seed: int) -> None:
    """Write an archive with some training images of each label, and all test images."""
    choice = random.Random(seed)  # noqa: S311 - the same images each time
    with tarfile.open(CIFAR10_FILE) as archive, tarfile.open(out, "w") as result:
        folders: dict[str, list[tarfile.TarInfo]] = {}
        for member in archive:
            if member.isfile():
                folders.setdefault(str(Path(member.name).parent), []).append(member)
        for folder, members in sorted(folders.items()):
            is_test = Path(folder).parent.name == "test"
            for member in members if is_test else choice.sample(members, IMAGES):
                result.addfile(member, archive.extractfile(member))


def _finish_run(start: str, seed: int) -> dict[str, Any]:
    """Return the metadata of a run, after finishing it if needed."""
    folder, data = RUNS_FOLDER / f"{start}-{seed}", RUNS_FOLDER / f"{seed}.tar"
    RUNS_FOLDER.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        write_few_images(data, seed)
    if "measured" not in load_run_metadata(folder):
        command = [sys.executable, "-m", "fovea", "train", "--data", str(data), "--from", start]
        command += ["--seed", str(seed), "--out", str(folder), "--resume"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return load_run_metadata(folder)


def _format_row(start: str, runs: list[dict[str, Any]]) -> str:
    accuracies = [100 * run["measured"]["accuracy"] for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    minutes = sum(epoch["seconds"] for run in runs for epoch in run["progress"]["history"]) / 60 / len(runs)
    net = runs[0]["net"]
    return (
        f"| `{start}` | `{net['name']}`, {net['size']} px | {statistics.mean(accuracies):.1f}{spread} % "
        f"| {len(runs)} | {minutes:.1f} |"
    )


if __name__ == "__main__":
    main()
