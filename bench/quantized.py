"""The `make bench-int8` benchmark: a service with an int8 version beside one with its float version.

Both services run at the same time, and wrk loads them in turn. The ratio is taken in each round. Without
arguments, the photographs' MobileNetV2 of `make bench` is quantized; its weights are random, so only the
share of equal answers says how accurate it is. `--version zoo/pets/2` measures a version that `fovea
quantize` has written, and its contract says how accurate it is. `--memory` measures calibration instead.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from fovea.bench.cells import run_wrk
from fovea.bench.mixed import describe_machine
from fovea.bench.oip import start_service
from fovea.bench.workloads import WORKLOADS, BenchError, draw_picture
from fovea.export.quantize.calibration import collect_histograms
from fovea.export.quantize.gate import Limits
from fovea.export.quantize.host import describe_processor
from fovea.export.quantize.pipeline import QuantizeRequest, quantize_model
from fovea.export.quantize.regions import find_region
from fovea.service.artifact.contract import Quantization
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import configure_pillow

CONNECTIONS: Final = (1, 8, 32)

_CALIBRATION_COUNTS: Final = (5, 25, 100)
"""Numbers of images for which the memory of calibration is measured."""

_WORKLOAD: Final = WORKLOADS["photographs"]


def main() -> int:
    """Measure both versions and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.quantized", description=__doc__)
    parser.add_argument("--version", type=Path, help="folder of a version that `fovea quantize` has written")
    parser.add_argument("--images", type=Path, help="folder of images to send (default: the photographs)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds for each load (default: 6)")
    parser.add_argument(
        "--seconds", type=float, default=4, help="time of one service in a round (default: 4)"
    )
    parser.add_argument("--memory", action="store_true", help="measure the memory of calibration alone")
    options = parser.parse_args()
    configure_pillow()
    try:
        if options.memory:
            _measure_calibration_memory()
            return 0
        with tempfile.TemporaryDirectory() as folder:
            images = _WORKLOAD.images if options.images is None else _list_files(options.images)
            version = options.version or _quantize_workload(Path(folder), images)
            _measure_versions(version, images, Path(folder), options.rounds, options.seconds)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _measure_calibration_memory() -> None:
    """Print the peak memory of this process before calibration, and after more and more images."""
    content = _WORKLOAD.build_model(_WORKLOAD.pixel_paths[0].value).read_bytes()
    contract = Engine(content, provider="cpu", threads=1).contract
    graph = onnx.load_from_string(content)
    region = find_region(graph, contract.input_name, contract.logits_name)
    height, width = contract.input.height, contract.input.width
    print(f"{len(region.activations)} tensors; before calibration: {_read_peak_mb():.0f} MB")
    for count in _CALIBRATION_COUNTS:

        def draw_images(count: int = count) -> Iterator[Pixels]:
            return (np.asarray(draw_picture((width, height), seed)) for seed in range(count))

        collect_histograms(graph, region.activations, draw_images, threads=1)
        print(f"{count} images: {_read_peak_mb():.0f} MB", flush=True)


def _read_peak_mb() -> float:
    """Return the largest resident size that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _list_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise BenchError(f"--images {folder} has no files")
    return files


def _quantize_workload(folder: Path, images: Sequence[Path]) -> Path:
    """Quantize the photographs' network, however many answers change. Return the version's folder."""
    version, photographs = folder / "zoo" / _WORKLOAD.name / "1", folder / "photographs"
    version.mkdir(parents=True)
    photographs.mkdir()
    shutil.copyfile(_WORKLOAD.build_model(_WORKLOAD.pixel_paths[0].value), version / MODEL_FILE)
    for number, path in enumerate(images):
        shutil.copyfile(path, photographs / f"{number}.jpg")
    request = QuantizeRequest(
        model=version,
        images=photographs,
        calibration_images=len(images),
        limits=Limits(max_loss=1.0, min_speedup=0.0),
        is_unlabelled=True,
        is_reduced=None,
        is_float16=False,
        command="make bench-int8",
    )
    return quantize_model(request, lambda line: print(line, flush=True))[1]


def _measure_versions(
    version: Path, images: Sequence[Path], folder: Path, rounds: int, seconds: float
) -> None:
    quantization = _read_quantization(version)
    image_list = folder / "images"
    image_list.write_text("".join(f"{path.absolute()}\n" for path in images))
    with ExitStack() as services:
        urls = []
        for number in (quantization.source_version, version.name):
            address = services.enter_context(start_service(version.parent / number / MODEL_FILE))
            urls.append("http://{}:{}/v1/classify".format(*address))
        print("\n| connections | float32, images/s | int8, images/s | int8 / float32, median (range) |")
        print("|---|---|---|---|")
        for connections in CONNECTIONS:
            rates = _measure_rates(urls, connections, image_list, rounds, seconds)
            ratios = sorted(int8 / float32 for float32, int8 in rates)
            float32, int8 = (statistics.median(one) for one in zip(*rates, strict=True))
            print(
                f"| {connections} | {float32:,.0f} | {int8:,.0f} | {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )
    print(f"\n{_describe_accuracy(quantization)}\n{describe_processor()}; {describe_machine()}.")


def _read_quantization(version: Path) -> Quantization:
    engine = Engine.load(version / MODEL_FILE, provider="cpu", threads=1)
    if engine.contract.quantization is None:
        raise BenchError(f"{version} is a float model; give a version that `fovea quantize` has written")
    return engine.contract.quantization


def _measure_rates(
    urls: Sequence[str], connections: int, images: Path, rounds: int, seconds: float
) -> list[list[float]]:
    """Return the images per second of each service, one row for each round."""
    for url in urls:
        run_wrk(url, connections, 1, images)
    rates = []
    for number in range(rounds):
        row = [0.0] * len(urls)
        for index in range(len(urls)) if number % 2 else reversed(range(len(urls))):
            report = run_wrk(urls[index], connections, seconds, images)
            row[index] = report["requests"] / report["seconds"]
        rates.append(row)
    return rates


def _describe_accuracy(quantization: Quantization) -> str:
    text = f"{quantization.recipe}: of {quantization.images} held-out images "
    if quantization.source_top1 is not None and quantization.top1 is not None:
        text += f"{quantization.source_top1:.2%} are right before and {quantization.top1:.2%} after, "
    return f"{text}{quantization.agreement:.1%} have the same answer."


if __name__ == "__main__":
    sys.exit(main())
