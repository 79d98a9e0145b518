"""The `make bench-providers` benchmark: OpenVINO against plain ONNX Runtime on the CPU.

Both run the same model files on the same pixels, in sessions that the service's own code opens. The sessions
take turns, several calls each, and the ratio is taken per round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fovea.bench.imported import import_network
from fovea.bench.mixed import describe_machine
from fovea.service.artifact.contract import Contract
from fovea.service.errors import ModelError
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.session import open_session

NETWORKS: Final = ("resnet50", "mobilenet_v2")
ARITHMETICS: Final = ("float32", "int8")

_TURN_SECONDS: Final = 0.25
"""Length of one session's turn: several calls, so that the caches hold its weights."""


@dataclass(frozen=True)
class Comparison:
    """One graph with one number of threads and images per call; times are seconds per image, by round."""

    network: str
    arithmetic: str
    threads: int
    images: int
    cpu: list[float]
    openvino: list[float]
    difference: float
    """Largest difference of a logit between both, as a share of the largest logit."""

    def format_row(self) -> str:
        """Return a row of the Markdown table: medians in milliseconds, and the ratio's median and range."""
        ratios = sorted(cpu / other for cpu, other in zip(self.cpu, self.openvino, strict=True))
        cpu, openvino = (1e3 * statistics.median(times) for times in (self.cpu, self.openvino))
        cells = (
            self.network,
            self.arithmetic,
            self.threads,
            self.images,
            f"{cpu:.2f}",
            f"{openvino:.2f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            f"{self.difference:.1e}",
        )
        return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Measure as the command line asks and print a Markdown table; return 2 without OpenVINO."""
    options = _parse_arguments()
    comparisons = []
    try:
        for network, arithmetic in itertools.product(options.networks, ARITHMETICS):
            model = import_network(network, arithmetic).model_file.read_bytes()
            for threads, images in itertools.product(options.threads, options.images):
                comparison = compare_providers(model, network, arithmetic, threads, images, options.rounds)
                print(comparison.format_row(), flush=True)
                comparisons.append(comparison)
    except ModelError as error:
        print(f"providers: {error}", file=sys.stderr)
        return 2
    print(
        "\n| network | arithmetic | threads | images per call | ONNX Runtime, ms per image | OpenVINO "
        "| ratio of the speeds | difference of a logit |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(one.format_row() for one in comparisons))
    print(f"\n{describe_machine()}, {options.rounds} rounds")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.providers", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="threads of a call (default: 1 2)"
    )
    parser.add_argument(
        "--images", nargs="+", type=int, default=[1, 4], help="images per call (default: 1 4)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of each session (default: 8)")
    return parser.parse_args()


def compare_providers(
    model: bytes, network: str, arithmetic: str, threads: int, images: int, rounds: int
) -> Comparison:
    """Measure one model on both providers, by turns. Raises `ModelError` if OpenVINO is not installed."""
    sessions = [open_session(model, provider, threads) for provider in ("cpu", "openvino")]
    contract = Contract.from_metadata(sessions[0].get_modelmeta().custom_metadata_map)
    shape = (images, contract.input.height, contract.input.width, 3)
    pixels = {contract.input_name: np.random.default_rng(0).integers(0, 256, shape, np.uint8)}
    logits, other_logits = (session.run([contract.logits_name], pixels)[0] for session in sessions)
    names = [contract.probabilities_name]
    times = [[_measure_turn(session, names, pixels) for session in sessions] for _ in range(rounds)]
    cpu, openvino = ([seconds / images for seconds in column] for column in zip(*times, strict=True))
    difference = float(np.abs(logits - other_logits).max() / np.abs(logits).max())
    return Comparison(network, arithmetic, threads, images, cpu, openvino, difference)


def _measure_turn(session: Any, names: list[str], pixels: dict[str, Pixels]) -> float:
    """Return the seconds per call of one turn, after a call that is not counted."""
    session.run(names, pixels)
    calls, started_at = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started_at) < _TURN_SECONDS:
        session.run(names, pixels)
        calls += 1
    return elapsed / calls


if __name__ == "__main__":
    sys.exit(main())
