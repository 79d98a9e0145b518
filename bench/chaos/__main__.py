"""The `make chaos` test: a service at half load under killed and stopped processes and misbehaving clients.

Runners, workers and explaining processes get SIGKILL and SIGSTOP. Versions are swapped, and a model is
unloaded and loaded. Clients leave while they send, wait or read, set deadlines, and send bad input, bombs and
the most expensive legal pictures. The service has 512 MB of memory for each worker. Then these properties
must hold:

* no answer is wrong: every client knows the right probabilities of its pictures, for each version;
* no answer is lost except in a killed process, and no answer comes after its limit;
* memory and open files return to their former values, and nothing is left behind;
* the service's counts equal the clients' counts, except for requests in a killed process.

All random choices come from one seed, which is printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

from fovea.bench import gallery
from fovea.bench.chaos.clients import CALLER_COUNT
from fovea.bench.chaos.legs import LegResult, run_leg
from fovea.bench.chaos.options import parse_arguments
from fovea.bench.chaos.service import start_service
from fovea.bench.gallery import Picture
from fovea.bench.mixed import describe_machine
from fovea.bench.swaps import BenchRepository
from fovea.bench.workloads import BenchError

PICTURE_COUNT: Final = 240
"""Number of drawn pictures for all clients together."""


def main() -> int:
    """Run the test, print a table, and write JSON; return 1 if a property does not hold."""
    options = parse_arguments((__doc__ or "").partition("\n")[0])
    print(f"seed {options.seed}, {options.minutes:g} minutes, workers {options.workers}", flush=True)
    try:
        pictures, giants = _draw_known_pictures(options.seed)
        print(
            f"The right answers to {len(pictures)} pictures and {len(giants)} giants are known.", flush=True
        )
        seconds = 60 * options.minutes / len(options.workers)
        results = []
        for workers in options.workers:
            results.append(run_leg(workers, seconds, pictures, giants, options))
            _show_result(results[-1])
    except BenchError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": describe_machine(), "seed": options.seed, "legs": [asdict(one) for one in results]}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{describe_machine()}. All results are in {options.out}.")
    has_failed = any(one.failures for one in results)
    if has_failed:
        print(f"Repeat this run with --seed {options.seed}.")
    return int(has_failed)


def _draw_known_pictures(seed: int) -> tuple[list[Picture], list[Picture]]:
    """Draw the pictures, and learn their answers from an undisturbed service.

    Raises `BenchError`.
    """
    pictures, giants = gallery.draw_pictures(PICTURE_COUNT, seed), gallery.draw_giants()
    with tempfile.TemporaryDirectory(prefix="fovea-calm-") as folder:
        repository = BenchRepository(Path(folder), "swapped")
        versions = ["1", repository.publish_next_version()]
        (repository.root / "swapped" / "config.toml").write_text(f"versions = {json.dumps(versions)}\n")
        with start_service(repository.root, Path(folder) / "log", None, {}) as service:
            gallery.learn_answers(service.url, "swapped", versions, [*pictures, *giants])
    distinct_pictures = gallery.filter_distinct(pictures)
    if len(distinct_pictures) < 4 * CALLER_COUNT:
        raise BenchError(
            f"only {len(distinct_pictures)} of {len(pictures)} pictures have an answer that no other "
            f"picture has; the test needs {4 * CALLER_COUNT}"
        )
    return distinct_pictures, giants


def _find_missing_events(result: LegResult) -> list[str]:
    """Return the events that never happened; under a memory limit they may always be refused."""
    missing = {
        "no version was swapped": not result.swaps,
        "no explanation was answered": not result.kinds.get("explanation: 200"),
        "no giant was answered": not any(
            kind.startswith("giant") and kind.endswith(": 200") for kind in result.kinds
        ),
    }
    return [name for name, is_missing in missing.items() if is_missing]


def _show_result(result: LegResult) -> None:
    print(f"\n{result.workers} workers, {result.seconds:.0f} s, {result.rate:.0f} good requests/s planned, "
          f"{result.memory}")  # fmt: skip
    print("\n| requests | times |\n|---|---|")
    for name, number in result.kinds.items():
        print(f"| {name} | {number} |")
    print("\n| kind | longest, s |\n|---|---|")
    for name, seconds in sorted(result.longest.items()):
        print(f"| {name} | {seconds:.2f} |")
    faults = ", ".join(f"{number} x {name}" for name, number in sorted(result.faults.items()))
    print(
        f"\n{faults}; {result.swaps} swaps, {result.memory_refusals} changes "
        f"postponed for lack of memory. {result.excused_requests} requests were excused by a fault."
    )
    if result.idle_states:
        state_before, state_after = result.idle_states
        for when, rest in (("before", state_before), ("after", state_after)):
            print(f"At rest {when}: {rest.resident_bytes / 1e6:.0f} MB, the first process "
                  f"{rest.main_bytes / 1e6:.0f} MB, {rest.open_files} open files.")  # fmt: skip
        print(f"Under load the trend is {result.rise}; peak {(result.peak or 0) / 1e6:.0f} MB.")
    if result.errors:
        print("\nErrors in the service's log:")
        for message, number in result.errors.items():
            print(f"  {number} x {message}")
    for name in _find_missing_events(result):
        print(
            f"\nNOT TESTED: {name} in this leg; "
            "give the service more memory (--memory) or more time (--minutes)"
        )
    print("\n" + ("\n".join(f"FAILED {one}" for one in result.failures) or "All properties hold."))
    if result.failures:
        print(f"The service's log is {result.log}.")


if __name__ == "__main__":
    sys.exit(main())
