"""The `fovea bench URL` command: the speed of any running service."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from fovea.bench.load import LoadResult, run_closed_loop, run_open_loop
from fovea.http_calls import read_key_header
from fovea.service.errors import FoveaError

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)

_BAR_COUNT: Final = 12
"""Number of bars; each covers a range with a constant ratio of latencies."""

_GRACE_SECONDS: Final = 10.0
"""Time to wait for answers after the last request, in seconds."""


class BenchError(FoveaError):
    """The URL cannot be loaded."""


def run_bench(
    url: str, images: Sequence[Path], *, rate: float | None, callers: int, seconds: float, as_json: bool
) -> int:
    """Load `url` and print the result; return 0, or 1 if any request was not answered with 200.

    With `rate`, requests are sent at that rate per second, whether or not earlier ones are answered. Without
    `rate`, each of `callers` sends its next request after an answer. FOVEA_KEY has the API key if the service
    needs one. Raises `BenchError` if the URL does not
    answer with 200.
    """
    url = _complete_url(url)
    try:
        read_key_header()
    except ValueError as error:
        raise BenchError(str(error)) from None
    bodies = [path.read_bytes() for path in images] or [draw_jpeg(seed) for seed in range(16)]
    _check_url(url, bodies[0])
    if rate is None:
        result = run_closed_loop(url, bodies, callers=callers, seconds=seconds, grace_seconds=_GRACE_SECONDS)
    else:
        result = run_open_loop(url, bodies, rate=rate, seconds=seconds, grace_seconds=_GRACE_SECONDS)
    figures = summarize_result(result)
    if as_json:
        print(json.dumps({"url": url, "rate": rate, "callers": None if rate else callers, **figures}))
    else:
        _show_result(url, result, figures, rate, callers)
    return int(figures["answered"] < figures["sent"])


def summarize_result(result: LoadResult) -> dict[str, Any]:
    """Return the figures as plain values; times are in seconds, None without an answer."""
    good = result.latency[result.status == 200]
    figures = {f"p{one:g}": result.percentile(one) for one in PERCENTILES}
    return {
        "seconds": result.seconds,
        "sent": len(result.planned_times),
        "answered": len(good),
        "per_second": result.answer_rate(max_latency=math.inf),
        "statuses": result.statuses,
        "errors": result.errors,
        "latency": {name: None if math.isnan(value) else round(value, 6) for name, value in figures.items()},
        "late": result.late_requests,
        "waited_for_a_connection": result.queued_requests,
    }


def _complete_url(url: str) -> str:
    message = f"{url} is not an address that can be loaded; give one like http://127.0.0.1:8000"
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        (parts.hostname or "").encode("idna")
        is_usable = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:  # invalid brackets, ports or names
        raise BenchError(message) from None
    if not is_usable:
        raise BenchError(message)
    path = parts.path if parts.path.strip("/") else "/v1/classify"
    return parts._replace(path=path).geturl()


def draw_jpeg(seed: int) -> bytes:
    """Return a JPEG of 512 x 384 px, the size of a photograph on a page, with smooth colours and noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _check_url(url: str, body: bytes) -> None:
    """Raise `BenchError` unless one request is answered with 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=_GRACE_SECONDS)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": "application/octet-stream", **read_key_header()}
        connection.request("POST", target, body, headers)
        reply = connection.getresponse()
        text = reply.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no service answers at {url}: {error}") from None
    finally:
        connection.close()
    if reply.status != 200:
        raise BenchError(f"{url} answers an image with {reply.status}: {text}")


# --- display -------------------------------------------------------------------------------------


def _show_result(
    url: str, result: LoadResult, figures: dict[str, Any], rate: float | None, callers: int
) -> None:
    console = Console(highlight=False, markup=False)
    load_text = (
        f"{rate:g} requests a second" if rate else f"{callers} callers, each with one request at a time"
    )
    console.print(f"{url}: {load_text}, {result.seconds:g} s", soft_wrap=True)
    console.print(
        f"  {figures['per_second']:.1f} answers a second, {figures['answered']} of {figures['sent']} in all"
    )
    others = {status: count for status, count in figures["statuses"].items() if status != 200}
    for outcome, count in [*others.items(), *figures["errors"].items()]:
        console.print(f"  {count} x {outcome}", style="red")
    if result.late_requests:
        console.print(
            f"  {result.late_requests} requests were sent late: this machine cannot send faster",
            style="yellow",
        )
    latencies = result.latency[result.status == 200]
    if len(latencies):
        latency_text = "  ".join(
            f"{name} {_format_time(value)}" for name, value in figures["latency"].items()
        )
        console.print(f"  {latency_text}".replace("p100", "max"), soft_wrap=True)
        console.print(_draw_histogram(latencies))


def _draw_histogram(latencies: npt.NDArray[np.float64]) -> Table:
    """Return a histogram of latencies; each row begins where the previous row ends."""
    low, high = float(latencies.min()), float(latencies.max())
    edges = np.geomspace(low, high * 1.0001, _BAR_COUNT + 1) if high > low else np.array([low, low * 1.1])
    counts, _ = np.histogram(latencies, edges)
    table = Table(box=None, show_header=False, padding=(0, 1))
    for _ in range(2):
        table.add_column(justify="right")
    table.add_column(width=50)
    for edge, count in zip(edges[1:], counts.tolist(), strict=True):
        table.add_row(
            f"≤ {_format_time(float(edge))}", str(count), Bar(int(counts.max()), 0, count, color="green")
        )
    return table


def _format_time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
