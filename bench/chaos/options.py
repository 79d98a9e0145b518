"""The options of `make chaos`."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.bench.workloads import CACHE

GAPS: Final = {
    "kill-runner": 12.0,
    "stop-runner": 20.0,
    "kill-worker": 30.0,
    "stop-worker": 40.0,
    "kill-explainer": 10.0,
    "stop-explainer": 15.0,
    "swap": 10.0,
    "unload": 12.0,
    "giant": 4.0,
}
"""Average time between two events of each kind, in seconds."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    minutes: float
    workers: tuple[int, ...]
    load: float
    memory: int
    """Memory limit for each worker, in bytes; 0 for no limit."""
    seed: int
    settings: dict[str, str]
    gaps: dict[str, float]
    out: Path


def parse_arguments(description: str) -> Options:
    """Parse the command line; `description` is the text of its help."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.chaos", description=description)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="duration of all legs together (default: 20)"
    )
    parser.add_argument("--workers", type=_parse_numbers, default=(1, 2), metavar="N,M",
                        help="run a leg with each of these numbers of workers (default: 1,2)")  # fmt: skip
    parser.add_argument("--load", type=float, default=0.5,
                        help="load as a share of the measured capacity (default: 0.5)")  # fmt: skip
    parser.add_argument("--memory", type=int, default=512, metavar="MB",
                        help="memory limit for each worker, 0 for no limit (default: 512)")  # fmt: skip
    parser.add_argument(
        "--seed", type=int, help="seed of all random choices (default: a new one, which is printed)"
    )
    parser.add_argument("--set", type=_parse_pair, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting or another environment variable of the service")  # fmt: skip
    parser.add_argument("--gap", type=_parse_pair, action="append", default=[], metavar="NAME=SECONDS",
                        help=f"average time between events; NAME is one of {', '.join(GAPS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=CACHE / "chaos.json")
    arguments = parser.parse_args()
    gaps = {**GAPS, **{name: float(value) for name, value in arguments.gap}}
    if unknown := sorted(gaps.keys() - GAPS.keys()):
        parser.error(f"--gap: {unknown[0]} is not a known event; known are {', '.join(GAPS)}")
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    return Options(
        arguments.minutes,
        arguments.workers,
        arguments.load,
        arguments.memory << 20,
        seed,
        dict(arguments.set),
        gaps,
        arguments.out,
    )


def _parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


def _parse_pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value
