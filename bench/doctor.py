"""The `fovea doctor` command: the service's capacity on this machine and its bottleneck."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from fovea.bench.command import picture
from fovea.bench.load import Result, keep_asking
from fovea.bench.processes import Stopwatch, running
from fovea.service.errors import FoveaError
from fovea.service.resources.cgroup import Cgroup

CALLERS: Final = 32
"""Number of callers that keeps every runner of a machine with a dozen processors busy."""

_BUSY: Final = 0.85
"""Share of its time from which a runner counts as fully busy."""

_THROTTLED: Final = 0.05
"""Share of the time below which a CPU quota has no noticeable effect."""

_FULL: Final = 0.9
"""Share of the memory limit from which memory counts as full."""

Metrics = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


class DoctorError(FoveaError):
    """The service does not start; the message is the service's own."""


@dataclass(frozen=True)
class Findings:
    """The figures of a self-load; shares are of the load's duration."""

    answered: float
    """Images per second."""
    p50: float
    """Median latency, in seconds."""
    p99: float
    failed: int
    """Number of requests that were not answered with 200."""
    busy: float
    """Share of all usable processors that the service used."""
    client: float
    """Share of all usable processors that the load itself used."""
    others: float
    """Share of all usable processors that other processes used."""
    runners: float
    """Share of their time in which runners had a batch."""
    decode: float
    """Share of decoding in the runners' work; the rest is the model."""
    throttled: float
    """Share of the time in which a CPU quota throttled processes."""
    memory: float | None
    """Share of the container's memory limit that is in use; None without a limit."""


def doctor(*, seconds: float, as_json: bool) -> int:
    """Start a service with the environment's settings, load it, and print the findings; return 0.

    Raises `DoctorError` if it does not start.
    """
    with _service() as (classify, process):
        root = classify.partition("/v1/")[0]
        runtime = json.loads(_get(f"{root}/runtime"))
        found = _load(classify, f"{root}/metrics", process.pid, runtime, seconds)
    verdict, advice = diagnose(found, runtime)
    if as_json:
        print(json.dumps({"runtime": runtime, "load": vars(found), "bottleneck": verdict, "advice": advice}))
    else:
        _show(runtime, found, verdict, advice, seconds)
    return 0


@contextlib.contextmanager
def _service() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the URL for classification and the process of a new service."""
    environment = {
        **os.environ,
        "FOVEA_PORT": "0",
        "FOVEA_HOST": "127.0.0.1",
        "FOVEA_DRAIN_GRACE": "0",
        "FOVEA_STRICT": "true",
    }
    command = [sys.executable, "-m", "fovea.service"]
    with running(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        greeting = "".join(process.stdout.readline() for _ in range(2)) if process.stdout else ""
        address = re.search(r"http://\S+/v1/\S+", greeting)
        if address is None:
            said = process.stderr.read() if process.stderr else ""
            last = (said.strip().splitlines() or ["the service ended without a word"])[-1]
            raise DoctorError(last.removeprefix("fovea: "))
        yield address[0], process


def _get(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as reply:
        text: str = reply.read().decode()
    return text


def _load(classify: str, metrics: str, pid: int, runtime: dict[str, Any], seconds: float) -> Findings:
    bodies = [picture(seed) for seed in range(16)]
    keep_asking(classify, bodies, callers=CALLERS, seconds=0.5)  # warm-up
    started, before, watch = time.monotonic(), _read(metrics), Stopwatch([pid])
    result = keep_asking(classify, bodies, callers=CALLERS, seconds=seconds)
    used, others = watch.read()
    after = _read(metrics)
    return _findings(result, before, after, time.monotonic() - started, runtime, used, others)


def _findings(
    result: Result,
    before: Metrics,
    after: Metrics,
    passed: float,
    runtime: dict[str, Any],
    used: float,
    others: float,
) -> Findings:
    """Return the findings between two metric scrapes that are `passed` seconds apart.

    The last answers come after the end of the load itself.
    """

    def risen(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0.0) - before.get(key, 0.0)

    cpus, runners = runtime["threads"]["cpus"], runtime["threads"]["runners"]
    decode, model = (risen("fovea_stage_seconds_sum", stage=stage) for stage in ("decode", "inference"))
    limit = after.get(("fovea_container_memory_limit_bytes", ()))
    resident = after[("process_resident_memory_bytes", ())]
    return Findings(
        answered=result.answered(within=float("inf")),
        p50=result.percentile(50),
        p99=result.percentile(99),
        failed=len(result.planned) - result.statuses.get(200, 0),
        busy=used / passed / cpus,
        client=result.cpu_seconds / passed / cpus,
        others=others / cpus,
        runners=risen("fovea_runner_busy_seconds_total") / passed / runners,
        decode=decode / ((decode + model) or 1),
        throttled=risen("fovea_container_throttled_seconds_total") / passed,
        memory=resident / limit if limit else None,
    )


def _read(metrics: str) -> Metrics:
    families = text_string_to_metric_families(_get(metrics))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def diagnose(found: Findings, runtime: Mapping[str, Any]) -> tuple[str, str]:
    """Return the bottleneck and advice; the strongest explanation comes first."""
    threads = runtime["threads"]
    if found.failed:
        return "errors", "requests failed; `fovea serve` and its log say why"
    if found.memory is not None and found.memory > _FULL:
        share = f"{found.memory:.0%} of the container's memory is in use"
        return "memory", f"{share}: raise its limit, or lower FOVEA_DECODE_BYTES and FOVEA_BODIES_BYTES"
    if found.throttled > _THROTTLED:
        share = f"for {found.throttled:.0%} of the time the CPU quota was used up"
        return "CPU quota", f"{share}: raise it, or let it be whole processors"
    if found.others > 0.25:
        share = f"{found.others:.0%} of the processors' time went to something else on this machine"
        return "neighbours", f"{share}: measure again when it is quiet"
    if found.runners > _BUSY and found.busy + found.client < _BUSY and threads["runners"] < threads["cpus"]:
        least = f"{threads['runners']} runners for {threads['cpus']:g} processors"
        return "runners", f"{least}: leave FOVEA_RUNNERS at 0, which makes one for each"
    if found.runners < _BUSY and found.busy + found.client < _BUSY:
        return (
            "load",
            "processors and runners have room, and this load cannot ask faster: use several clients",
        )
    if found.decode > 0.5:
        share = f"{found.decode:.0%} of the runners' work is decoding"
        return "processors", f"{share}: more of them, smaller uploads, or a model whose pixel path is `fast`"
    share = f"{1 - found.decode:.0%} of the runners' work is the model"
    return "processors", f"{share}: more of them, a GPU, or a smaller model"


# --- display -------------------------------------------------------------------------------------


def _show(runtime: dict[str, Any], found: Findings, verdict: str, advice: str, seconds: float) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _lines(runtime, found, seconds):
        table.add_row(name, text)
    table.add_row("bottleneck", f"{verdict}: {advice}", style="yellow")
    console.print(table)


def _lines(runtime: dict[str, Any], found: Findings, seconds: float) -> list[tuple[str, str]]:
    threads, limits = runtime["threads"], runtime["limits"]
    quota, memory = Cgroup().cpu_quota(), Cgroup().memory_limit_bytes()
    engine = f"Python {runtime['python']}, ONNX Runtime {runtime['onnxruntime']}"
    shares = (
        f"{threads['runners']} runners of {threads['runner_threads']}, "
        f"{threads['wide_threads'] or threads['runner_threads']} for a call that is alone, "
        f"{threads['decode_threads']} decoding in each"
    )
    bounds = (
        f"{limits['queue_images']} images in flight, {limits['body_bytes'] / 2**20:g} MiB a body, "
        f"{limits['image_pixels'] / 1e6:g} MP an image, {limits['decode_bytes'] / 2**30:g} GiB to decode"
    )
    load = (
        f"{found.answered:.0f} images of 512 x 384 a second, from {CALLERS} callers for {seconds:g} s; "
        f"half are answered within {1e3 * found.p50:.0f} ms, 99 % within {1e3 * found.p99:.0f} ms"
    )
    use = (
        f"processors: {found.busy:.0%} the service, {found.client:.0%} this load, {found.others:.0%} "
        f"others; runners {found.runners:.0%} at work, {found.decode:.0%} of it decoding"
    )
    return [
        ("versions", f"Fovea {runtime['fovea']}, {engine}"),
        ("processors", f"{threads['cpus']:g} ({'no quota' if quota is None else f'quota {quota:g}'})"),
        ("memory", "no limit" if memory is None else f"at most {memory / 2**30:.2f} GiB"),
        ("providers", ", ".join(runtime["providers_available"])),
        ("threads", shares),
        ("limits", bounds),
        *(("model", _model(model)) for model in runtime["models"]),
        ("self-load", load),
        ("", use),
    ]


def _model(model: dict[str, Any]) -> str:
    golden = model["golden"]
    pixels, logits = golden["pixel_difference"], golden["logit_difference"]
    return (
        f"{model['name']} version {model['version']} on {model['provider']}; golden set: "
        f"{golden['images']} images, pixels to {pixels:.2g} of 255, logits to {logits:.1g}"
    )
