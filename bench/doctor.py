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

from fovea.bench.command import draw_jpeg
from fovea.bench.load import LoadResult, run_closed_loop
from fovea.bench.processes import CpuStopwatch, start_process
from fovea.service.errors import FoveaError
from fovea.service.resources.cgroup import Cgroup

CALLER_COUNT: Final = 32
"""Number of callers that keeps every runner of a machine with a dozen processors busy."""

_BUSY_SHARE: Final = 0.85
"""Share of its time from which a runner counts as fully busy."""

_THROTTLED_SHARE: Final = 0.05
"""Share of the time below which a CPU quota has no noticeable effect."""

_FULL_MEMORY_SHARE: Final = 0.9
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


def run_doctor(*, seconds: float, as_json: bool) -> int:
    """Start a service with the environment's settings, load it, and print the findings; return 0.

    Raises `DoctorError` if it does not start.
    """
    with _start_service() as (classify_url, process):
        root = classify_url.partition("/v1/")[0]
        runtime = json.loads(_fetch_text(f"{root}/runtime"))
        findings = _run_load(classify_url, f"{root}/metrics", process.pid, runtime, seconds)
    bottleneck, advice = diagnose_bottleneck(findings, runtime)
    if as_json:
        print(
            json.dumps(
                {"runtime": runtime, "load": vars(findings), "bottleneck": bottleneck, "advice": advice}
            )
        )
    else:
        _show_findings(runtime, findings, bottleneck, advice, seconds)
    return 0


@contextlib.contextmanager
def _start_service() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the URL for classification and the process of a new service."""
    environment = {
        **os.environ,
        "FOVEA_PORT": "0",
        "FOVEA_HOST": "127.0.0.1",
        "FOVEA_DRAIN_GRACE": "0",
        "FOVEA_STRICT": "true",
    }
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        greeting = "".join(process.stdout.readline() for _ in range(2)) if process.stdout else ""
        address = re.search(r"http://\S+/v1/\S+", greeting)
        if address is None:
            error_text = process.stderr.read() if process.stderr else ""
            last_line = (error_text.strip().splitlines() or ["the service ended without an error message"])[
                -1
            ]
            raise DoctorError(last_line.removeprefix("fovea: "))
        yield address[0], process


def _fetch_text(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as reply:
        text: str = reply.read().decode()
    return text


def _run_load(
    classify_url: str, metrics_url: str, pid: int, runtime: dict[str, Any], seconds: float
) -> Findings:
    bodies = [draw_jpeg(seed) for seed in range(16)]
    run_closed_loop(classify_url, bodies, callers=CALLER_COUNT, seconds=0.5)  # warm-up
    started_at, metrics_before, stopwatch = time.monotonic(), read_metrics(metrics_url), CpuStopwatch([pid])
    result = run_closed_loop(classify_url, bodies, callers=CALLER_COUNT, seconds=seconds)
    used_seconds, others = stopwatch.read()
    metrics_after = read_metrics(metrics_url)
    return _compute_findings(
        result, metrics_before, metrics_after, time.monotonic() - started_at, runtime, used_seconds, others
    )


def _compute_findings(
    result: LoadResult,
    metrics_before: Metrics,
    metrics_after: Metrics,
    duration: float,
    runtime: dict[str, Any],
    used_seconds: float,
    others: float,
) -> Findings:
    """Return the findings between two metric scrapes that are `duration` seconds apart.

    The last answers come after the end of the load itself.
    """

    def get_increase(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return metrics_after.get(key, 0.0) - metrics_before.get(key, 0.0)

    cpus, runners = runtime["threads"]["cpus"], runtime["threads"]["runners"]
    decode, model = (
        get_increase("fovea_stage_seconds_sum", stage=stage) for stage in ("decode", "inference")
    )
    limit = metrics_after.get(("fovea_container_memory_limit_bytes", ()))
    resident = metrics_after[("process_resident_memory_bytes", ())]
    return Findings(
        answered=result.answer_rate(max_latency=float("inf")),
        p50=result.percentile(50),
        p99=result.percentile(99),
        failed=len(result.planned_times) - result.statuses.get(200, 0),
        busy=used_seconds / duration / cpus,
        client=result.cpu_seconds / duration / cpus,
        others=others / cpus,
        runners=get_increase("fovea_runner_busy_seconds_total") / duration / runners,
        decode=decode / ((decode + model) or 1),
        throttled=get_increase("fovea_container_throttled_seconds_total") / duration,
        memory=resident / limit if limit else None,
    )


def read_metrics(metrics_url: str) -> Metrics:
    """Return the samples of `/metrics` by name and sorted labels."""
    families = text_string_to_metric_families(_fetch_text(metrics_url))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def diagnose_bottleneck(findings: Findings, runtime: Mapping[str, Any]) -> tuple[str, str]:
    """Return the bottleneck and advice; the strongest explanation comes first."""
    threads = runtime["threads"]
    if findings.failed:
        return "errors", "requests failed; the log of `fovea serve` shows why"
    if findings.memory is not None and findings.memory > _FULL_MEMORY_SHARE:
        share = f"{findings.memory:.0%} of the container's memory is in use"
        return "memory", f"{share}: raise its limit, or lower FOVEA_DECODE_BYTES and FOVEA_BODIES_BYTES"
    if findings.throttled > _THROTTLED_SHARE:
        share = f"the CPU quota was used up for {findings.throttled:.0%} of the time"
        return "CPU quota", f"{share}: raise the quota, or set it to a whole number of processors"
    if findings.others > 0.25:
        share = f"other programs on this machine used {findings.others:.0%} of the processors' time"
        return "neighbours", f"{share}: measure again when they are idle"
    if (
        findings.runners > _BUSY_SHARE
        and findings.busy + findings.client < _BUSY_SHARE
        and threads["runners"] < threads["cpus"]
    ):
        counts = f"{threads['runners']} runners for {threads['cpus']:g} processors"
        return "runners", f"{counts}: set FOVEA_RUNNERS to 0, which starts one runner for each processor"
    if findings.runners < _BUSY_SHARE and findings.busy + findings.client < _BUSY_SHARE:
        return (
            "load",
            "processors and runners are not busy, and this load cannot send faster: use several clients",
        )
    if findings.decode > 0.5:
        share = f"{findings.decode:.0%} of the runners' work is decoding"
        return (
            "processors",
            f"{share}: use more processors, smaller uploads, or a model whose pixel path is `fast`",
        )
    share = f"{1 - findings.decode:.0%} of the runners' work is the model"
    return "processors", f"{share}: use more processors, a GPU, or a smaller model"


# --- display -------------------------------------------------------------------------------------


def _show_findings(
    runtime: dict[str, Any], findings: Findings, bottleneck: str, advice: str, seconds: float
) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _describe_findings(runtime, findings, seconds):
        table.add_row(name, text)
    table.add_row("bottleneck", f"{bottleneck}: {advice}", style="yellow")
    console.print(table)


def _describe_findings(runtime: dict[str, Any], findings: Findings, seconds: float) -> list[tuple[str, str]]:
    threads, limits = runtime["threads"], runtime["limits"]
    quota, memory = Cgroup().cpu_quota(), Cgroup().memory_limit_bytes()
    engine = f"Python {runtime['python']}, ONNX Runtime {runtime['onnxruntime']}"
    shares = (
        f"{threads['runners']} runners of {threads['runner_threads']}, "
        f"{threads['wide_threads'] or threads['runner_threads']} for a call without others, "
        f"{threads['decode_threads']} decoding in each"
    )
    bounds = (
        f"{limits['queue_images']} images in flight, {limits['body_bytes'] / 2**20:g} MiB a body, "
        f"{limits['image_pixels'] / 1e6:g} MP an image, {limits['decode_bytes'] / 2**30:g} GiB to decode"
    )
    load = (
        f"{findings.answered:.0f} images of 512 x 384 a second, "
        f"from {CALLER_COUNT} callers for {seconds:g} s; "
        f"half are answered within {1e3 * findings.p50:.0f} ms, 99 % within {1e3 * findings.p99:.0f} ms"
    )
    usage = (
        f"processors: {findings.busy:.0%} the service, {findings.client:.0%} this load, "
        f"{findings.others:.0%} others; runners {findings.runners:.0%} at work, "
        f"{findings.decode:.0%} of it decoding"
    )
    return [
        ("versions", f"Fovea {runtime['fovea']}, {engine}"),
        ("processors", f"{threads['cpus']:g} ({'no quota' if quota is None else f'quota {quota:g}'})"),
        ("memory", "no limit" if memory is None else f"at most {memory / 2**30:.2f} GiB"),
        ("providers", ", ".join(runtime["providers_available"])),
        ("threads", shares),
        ("limits", bounds),
        *(("model", _describe_model(model)) for model in runtime["models"]),
        ("self-load", load),
        ("", usage),
    ]


def _describe_model(model: dict[str, Any]) -> str:
    golden = model["golden"]
    pixels, logits = golden["pixel_difference"], golden["logit_difference"]
    return (
        f"{model['name']} version {model['version']} on {model['provider']}; golden set: "
        f"{golden['images']} images, pixels to {pixels:.2g} of 255, logits to {logits:.1g}"
    )
