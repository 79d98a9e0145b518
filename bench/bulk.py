"""Measure `fovea classify --out` on many images (`make bench-bulk`).

For each workload one run classifies all images. It takes turns with the bare loop (`bench.contestants`): one
is stopped while the other runs, so that both see the same machine. The bare loop is handwritten code in one
process for each core, with one thread of ONNX Runtime, the same network and the same images. It has its
images in memory, and writes nothing. The labels in the table must be those of the bare loop.

Then a second run of the thumbnails is killed (SIGKILL) at random moments, and continued by `--resume`. Its
table must have the bytes of the first one, and a row for each image.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import IO, Final, NamedTuple

from fovea.bench.contestants import MIN_AGREEMENT, BareLoop, compute_reference, start_loop
from fovea.bench.machine import describe_processor
from fovea.bench.processes import measure_resident_bytes, pause_tree, resume_tree, start_process
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError, Workload
from fovea.bulk.tables.choice import choose_format
from fovea.bulk.unfinished_run import find_parts_folder
from fovea.service.artifact.contract_file import read_contract

MIN_RATIO: Final = 0.95
"""Minimum throughput of the run, as a share of the bare loop's."""

MAX_GROWTH: Final = 0.05
"""Maximum growth of the memory (`BulkResult.growth`), as a share."""

_GROUP_TURNS: Final = 10
"""Number of turns whose ratio is shown: in one turn, about one part of a thousand images is finished."""

_START_SECONDS: Final = 60.0


@dataclass(frozen=True)
class BulkResult:
    """The result of one run: rates in images per second, memory in bytes."""

    workload: str
    images: int
    seconds: float
    """Time of the run without its start: from the first file that it writes to its end, without pauses."""
    start_seconds: float
    """Time to start Python, import and load the model."""
    bare_rate: float
    group_ratios: list[float]
    """Rate in each `_GROUP_TURNS` turns over that of the bare loop between them, by finished parts."""
    curve: list[tuple[float, int]]
    """(seconds of the run, memory)."""
    agreement: float
    """Share of the images with the bare loop's label."""

    @property
    def rate(self) -> float:
        return self.images / self.seconds

    @property
    def ratio(self) -> float:
        return self.rate / self.bare_rate

    @property
    def growth(self) -> float:
        """Growth of the memory from the first third of the run to its last third, as a share.

        The highest value of the first third, in which buffers reach their size, is compared with the median
        of the last third: at the very end, joining the parts takes the memory of one row group more.
        """
        memory = [one for _, one in self.curve]
        if len(memory) < 3:
            return 0.0
        third = len(memory) // 3
        return median(memory[-third:]) / max(memory[:third]) - 1


@dataclass(frozen=True)
class ResumeResult:
    """Outcome of a run that was killed and resumed."""

    finished_at_kill: list[int]
    """Number of finished images when each process was killed."""
    is_equal: bool
    """Whether the table has the bytes of that of the run in one go."""
    has_each_image_once: bool


def main() -> int:
    """Run the benchmark, print a table, write JSON and a picture; return 1 if a claim fails."""
    options = _parse_arguments()
    try:
        results, resume_result = run(options)
    except BenchError as error:
        print(f"bench-bulk: {error}", file=sys.stderr)
        return 2
    machine = describe_processor()
    failures = find_failures(results, resume_result)
    _show(results, resume_result, machine)
    print("\n".join(failures) or "Every claim holds.")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine,
        "runs": [{**asdict(one), "rate": one.rate, "ratio": one.ratio} for one in results],
        "resume": asdict(resume_result),
        "failed": failures,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.picture:
        # imported late: matplotlib is needed for the picture only
        from fovea.bench.picture import draw_bulk_memory

        draw_bulk_memory(results[0], machine, options.picture)
    return 1 if failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.bulk", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="thumbnails (default: 100,000)")
    parser.add_argument(
        "--photographs", type=int, default=1_000, help="photographs (default: 1,000); 0 for none"
    )
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of each turn (default: 1)")
    parser.add_argument("--kills", type=int, default=3, help="kills of the second run (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--suffix", default=".parquet", choices=[".parquet", ".csv", ".jsonl"])
    parser.add_argument("--picture", type=Path, default=CACHE / "bulk.svg")
    parser.add_argument("--json", type=Path, default=CACHE / "bulk.json")
    return parser.parse_args()


def run(options: argparse.Namespace) -> tuple[list[BulkResult], ResumeResult]:
    """Run everything. Raises `BenchError`."""
    workloads = {"thumbnails": options.images, "photographs": options.photographs}
    results = []
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        for workload_name, count in workloads.items():
            if count:
                workload = WORKLOADS[workload_name]
                folder = make_images(workload, count)
                out = Path(name) / f"{workload_name}{options.suffix}"
                results.append(measure_run(workload, folder, count, out, options.turn))
                print(f"  {_format_result(results[-1])}", flush=True)
        thumbnails = WORKLOADS["thumbnails"]
        resume_result = kill_and_resume(
            thumbnails,
            make_images(thumbnails, options.images),
            Path(name) / f"killed{options.suffix}",
            Path(name) / f"thumbnails{options.suffix}",
            options.kills,
            # from one run's time: the kills are spread over it
            results[0].seconds / (options.kills + 1),
            random.Random(options.seed),  # noqa: S311 - chooses moments
        )
    return results, resume_result


def make_images(workload: Workload, count: int) -> Path:
    """Return a folder with `count` different files, made once from the images of the workload.

    A comment in each JPEG makes the files differ, so that no cache finds two that are equal.
    """
    folder = CACHE / "bulk" / f"{workload.name}-{count}"
    if folder.exists():
        return folder
    print(f"writing {count:,} {workload.name} to {folder}", flush=True)
    contents = [path.read_bytes() for path in workload.images]
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for number in range(count):
        content = contents[number % len(contents)]
        path = partial / f"{number // 1000:03}" / f"{number:06}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        comment = f"{number:08}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big")
        path.write_bytes(content[:2] + marker + comment + content[2:])  # behind the start of the image
    partial.rename(folder)
    return folder


def measure_run(workload: Workload, folder: Path, count: int, out: Path, turn_seconds: float) -> BulkResult:
    """Run the command over a folder, taking turns with the bare loop. Raises `BenchError`."""
    curve: list[tuple[float, int]] = []
    active_seconds = 0.0
    turns: list[_Turn] = []
    with start_loop("bare", workload) as loop, tempfile.TemporaryFile("w+") as log:
        started_at = time.monotonic()
        with _start_run(workload, folder, out, log) as process:
            _wait_for_start(process, out)
            start_seconds = time.monotonic() - started_at
            while process.poll() is None:
                turn_started_at, finished_before = time.monotonic(), _count_finished(out)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(turn_seconds)
                if process.poll() is None:
                    pause_tree(process.pid)  # which takes its time, in which some processes still work
                elapsed = time.monotonic() - turn_started_at
                active_seconds += elapsed
                if process.poll() is None:
                    curve.append((active_seconds, measure_resident_bytes([process.pid])))
                finished = _count_finished(out) - finished_before
                turns.append(_Turn(finished, elapsed, _measure_bare(loop, turn_seconds)))
                resume_tree(process.pid)
            _check_end(process, log)
    groups = (turns[start : start + _GROUP_TURNS] for start in range(0, len(turns), _GROUP_TURNS))
    return BulkResult(
        workload.name,
        count,
        active_seconds,
        start_seconds,
        _compute_bare_rate(turns),
        [_compute_ratio(group) for group in groups if len(group) == _GROUP_TURNS and group[-1].finished >= 0],
        curve,
        compute_agreement(workload, out),
    )


class _Turn(NamedTuple):
    finished: int
    """Images in parts that were finished in the turn; negative for the last turn, which joins the parts."""
    seconds: float
    bare_rate: float


def _compute_bare_rate(turns: Sequence[_Turn]) -> float:
    return sum(turn.bare_rate for turn in turns) / len(turns)


def _compute_ratio(turns: Sequence[_Turn]) -> float:
    """Return the rate of the run in consecutive turns, over that of the bare loop."""
    seconds = sum(turn.seconds for turn in turns)
    return sum(turn.finished for turn in turns) / seconds / _compute_bare_rate(turns)


def compute_agreement(workload: Workload, out: Path) -> float:
    """Return the share of the images in a table with the label of the bare loop."""
    labels = read_contract(workload.build_model(workload.pixel_paths[0])).labels
    expected_labels = [labels[index] for index in compute_reference(workload).values()]
    rows = choose_format(out).read_rows(out)  # in the order of `make_images`
    agreements = [row.label == expected for row, expected in zip(rows, cycle(expected_labels), strict=False)]
    return sum(agreements) / len(agreements)


def _measure_bare(loop: BareLoop, seconds: float) -> float:
    _, rate = loop.run(seconds)
    return rate


@contextmanager
def _start_run(workload: Workload, folder: Path, out: Path, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FOVEA_")}
    model = workload.build_model(workload.pixel_paths[0])
    command = [
        sys.executable, "-m", "fovea", "classify", str(folder),
        "--models", str(model), "--out", str(out), "--resume",
    ]  # fmt: skip
    with start_process(command, env=environment, stdout=log, stderr=log) as process:
        yield process


def _wait_for_start(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until the run has loaded its model, and creates its folder."""
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if (find_parts_folder(out) / "manifest.json").exists():
            return
        time.sleep(0.005)


def _check_end(process: subprocess.Popen[str], log: IO[str]) -> None:
    log.seek(0)
    text = log.read()
    if process.returncode:
        raise BenchError(f"the command failed with exit code {process.returncode}: {text}")
    if errors := re.search(r"\d+ errors?", text):
        raise BenchError(f"images got {errors[0]}: {text}")


def _count_finished(out: Path) -> int:
    """Return the number of images in finished parts."""
    return sum(
        json.loads(path.read_bytes())["counts"]["images"]
        for path in find_parts_folder(out).glob("[0-9]*.json")
    )


def kill_and_resume(
    workload: Workload,
    folder: Path,
    out: Path,
    whole: Path,
    kills: int,
    seconds: float,
    choose: random.Random,
) -> ResumeResult:
    """Run the command, kill it about every `seconds`, and compare its table with that of the whole run."""
    finished_at_kill = []
    for _ in range(kills):
        with tempfile.TemporaryFile("w+") as log, _start_run(workload, folder, out, log) as process:
            _wait_for_start(process, out)
            try:
                process.wait(seconds * choose.uniform(0.5, 1.5))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                finished_at_kill.append(_count_finished(out))
                print(f"  killed with {finished_at_kill[-1]:,} images finished", flush=True)
    with tempfile.TemporaryFile("w+") as log, _start_run(workload, folder, out, log) as process:
        process.wait()
        _check_end(process, log)
    names = [row.path for row in choose_format(out).read_rows(out)]
    expected = sorted(str(path) for path in folder.rglob("*.jpg"))
    return ResumeResult(finished_at_kill, out.read_bytes() == whole.read_bytes(), names == expected)


def find_failures(results: list[BulkResult], resume_result: ResumeResult) -> list[str]:
    """Return a sentence for each claim that does not hold."""
    failures = [
        f"{one.workload}: {one.ratio:.2f} of the bare loop; at least {MIN_RATIO}"
        for one in results
        if one.ratio < MIN_RATIO
    ]
    failures += [
        f"{one.workload}: the memory grew by {one.growth:.0%} after the first third; at most {MAX_GROWTH:.0%}"
        for one in results
        if one.growth > MAX_GROWTH
    ]
    failures += [
        f"{one.workload}: {one.agreement:.1%} of the labels are the bare loop's; at least {MIN_AGREEMENT:.0%}"
        for one in results
        if one.agreement < MIN_AGREEMENT
    ]
    if not resume_result.is_equal:
        failures.append("the table of the killed run differs from that of the run in one go")
    if not resume_result.has_each_image_once:
        failures.append("the table of the killed run has not one row for each image")
    return failures


def _format_result(result: BulkResult) -> str:
    ratios = result.group_ratios or [result.ratio]
    highest = max(memory for _, memory in result.curve) if result.curve else 0
    return (
        f"| {result.workload} | {result.images:,} | {result.seconds:.1f} | {result.start_seconds:.1f} | "
        f"{result.rate:,.0f} | {result.bare_rate:,.0f} | {result.ratio:.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {highest / 1e6:.0f} | {result.agreement:.1%} |"
    )


def _show(results: list[BulkResult], resume_result: ResumeResult, machine: str) -> None:
    names = "workload", "images", "seconds", "start, s", "images/s", "bare loop", "ratio (ten turns)"
    print(f"\n| {' | '.join((*names, 'memory, MB', 'same label'))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        print(_format_result(result))
    kills = ", ".join(f"{one:,}" for one in resume_result.finished_at_kill)
    print(f"\nKilled with {kills} images finished; the same bytes: {resume_result.is_equal}.\n{machine}.")


if __name__ == "__main__":
    sys.exit(main())
