"""One run of all targets, two at a time, with what each has found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha1
from pathlib import Path
from typing import Final

from tests.fuzz.target import CORPUS, TARGETS, Target

ROOT: Final = Path(__file__).parents[2]

BUILD: Final = ROOT / "build" / "fuzz"
"""Folder of each target's inputs, which later runs begin with, and of its findings."""

_AT_ONCE: Final = 2


def write_seeds(name: str, target: Target) -> None:
    """Write the seeds of a target where libFuzzer reads them."""
    folder = BUILD / name / "seeds"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in target.make_seeds():
        (folder / sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def run_all(names: Sequence[str] = TARGETS) -> int:
    """Run targets for `FUZZ_SECONDS` each, print a line for each, and return the exit status.

    With `FUZZ_SEED`, every run tries the same inputs in the same order, as far as its time goes.
    """
    seconds = float(os.environ.get("FUZZ_SECONDS", "65"))
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        statuses = list(executor.map(lambda name: _run_target(name, seconds), names))
    return int(any(statuses))


def _run_target(name: str, seconds: float) -> bool:
    """Run one target; return True if it has found something or has not run."""
    seed = os.environ.get("FUZZ_SEED", "0")  # 0 is another one in each run
    folder = BUILD / name
    inputs, seeds = folder / "inputs", folder / "seeds"
    for one in (inputs, seeds):
        one.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("found-*"))
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        name,
        f"-max_total_time={seconds:g}",
        f"-seed={seed}",
        str(inputs),
        str(seeds),
    ]
    if (CORPUS / name).exists():
        command.append(str(CORPUS / name))
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed if seed != "0" else "random"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = folder / "log"
    log.write_text(process.stdout + process.stderr)
    found = sorted(set(folder.glob("found-*")) - before)
    count = re.search(r"stat::number_of_executed_units: (\d+)", process.stderr)
    coverage = re.findall(r"cov: (\d+)", process.stderr)
    reached = (
        f"{int(count[1]) if count else 0:,} inputs, {coverage[-1] if coverage else 0} places in the code"
    )
    if not process.returncode:
        print(f"{name}: {reached}", flush=True)
        return False
    error = re.findall(
        r"^(?:\w+\.)*\w+(?:Error|Exception|Interrupt): .*|ERROR: libFuzzer: .*",
        process.stdout + process.stderr,
        re.M,
    )
    where = ", ".join(str(path.relative_to(ROOT)) for path in found) or str(log.relative_to(ROOT))
    print(
        f"{name}: {reached}; FOUND {error[0] if error else 'an end without a reason'}: see {where}",
        flush=True,
    )
    for path in found:  # a run elsewhere may leave no more than this text
        print(f"{path.name}, base64: {b64encode(path.read_bytes()).decode()}", flush=True)
    return True
