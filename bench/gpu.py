"""The `make bench-gpu` benchmark: images per second of a GPU, on tensors and from JPEG files.

On tensors, Fovea's engine and bare ONNX Runtime run ResNet-50 in batches of 1 to 128, in float32 and float16,
by turns. From JPEG files, the service runs on all processors; its metrics tell the share of decoding in the
runners' time. The benchmark ends within its budget: what is not measured by then is missing in the tables.

Without a GPU, `--provider cpu` measures the same on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from fovea.bench.doctor import read_metrics
from fovea.bench.imported import SIDE, ImportedNetwork, import_network
from fovea.bench.load import run_closed_loop
from fovea.bench.oip import start_service
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError
from fovea.service.errors import ModelError
from fovea.service.inference.engine import Engine
from fovea.service.inference.session import open_session
from fovea.service.providers import PROVIDERS, ProviderName

BUDGET_SECONDS: Final = 540.0
"""Time for everything. A call into ONNX Runtime cannot be interrupted, so a minute of ten is left for one."""

ROUNDS: Final = 6

_TENSOR_SHARE: Final = 0.5
"""Share of the budget for the turns on tensors."""

CONTESTANTS: Final = ("bare ONNX Runtime", "Fovea, tensors", "Fovea, pixels", "chip alone")
"""Bare ONNX Runtime and `Fovea, tensors` get the same tensor from memory. `Fovea, pixels` gets uint8 as the
service does. For `chip alone` the tensor lies on the chip already, and the answer stays there."""


class OutOfTimeError(Exception):
    """The budget is used up."""


@dataclass(frozen=True)
class TensorRates:
    """Images per second of every contestant, by round."""

    arithmetic: str
    batch: int
    rates: dict[str, list[float]]

    def median(self, contestant: str) -> float:
        """Return the median of a contestant, in images per second."""
        return statistics.median(self.rates[contestant])


@dataclass(frozen=True)
class EndToEnd:
    """The service under load with JPEG files."""

    arithmetic: str
    rate: float
    """Answered images per second."""
    failed: int
    """Number of requests without an answer 200."""
    decode_seconds: float
    """Time in which one thread decodes one image, in seconds."""
    decode_share: float
    """Share of decoding in the runners' work; the rest is the model."""
    client_share: float
    """Share of one processor that the load itself used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line asks and print Markdown tables; return 1 if the time did not suffice."""
    options = _parse_arguments(arguments)
    started_at = time.monotonic()
    tensor_rates: list[TensorRates] = []
    services: list[EndToEnd] = []
    is_complete = False
    try:
        with limit_time(options.budget):
            networks = {
                one: import_network(options.network, one, side=options.side, folder=options.folder)
                for one in options.arithmetics
            }
            for network in networks.values():  # an error here says what to install
                open_session(network.model_file.read_bytes(), options.provider, 1)
            turn_count = ROUNDS * len(CONTESTANTS) * len(options.batches) * len(networks)
            turn_seconds = min(options.turn, _TENSOR_SHARE * options.budget / turn_count)
            for arithmetic, network in networks.items():
                seconds = min(options.seconds, options.budget / 10)
                services.append(measure_service(network, arithmetic, options.provider, seconds))
                for rates in measure_tensors(network, arithmetic, options, turn_seconds):
                    tensor_rates.append(rates)
                    print(_format_rates(rates), flush=True)
            is_complete = True
    except OutOfTimeError:
        print(f"gpu: {options.budget:g} s are over; the tables lack the rest", file=sys.stderr)
    except (BenchError, ModelError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    _show_tables(tensor_rates, services, options)
    print(f"{time.monotonic() - started_at:.0f} s of {options.budget:g} s.")
    return 0 if is_complete else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.gpu", description=__doc__)
    built_in_providers = [name for name, one in PROVIDERS.items() if not one.plugin]
    parser.add_argument("--provider", choices=built_in_providers, default="cuda")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything (540)")
    parser.add_argument("--turn", type=float, default=0.3, help="seconds of a turn on tensors, at most (0.3)")
    parser.add_argument("--seconds", type=float, default=15, help="seconds of load with JPEG, at most (15)")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--side", type=int, default=SIDE, help="side of the network's input (224)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--arithmetics", nargs="+", default=["float32", "float16"])
    parser.add_argument("--folder", type=Path, default=CACHE / "imported", help="folder of built networks")
    return parser.parse_args(arguments)


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` inside the block when the time is over. Only the main thread may call this."""

    def stop(_number: int, _frame: object) -> None:
        raise OutOfTimeError

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


# --- tensors -------------------------------------------------------------------------------------


def measure_tensors(
    network: ImportedNetwork, arithmetic: str, options: argparse.Namespace, turn_seconds: float
) -> Iterator[TensorRates]:
    """Yield the rates for each batch size. Raises `BenchError` if the answers differ, and `ModelError`."""
    provider: ProviderName = options.provider
    engine = Engine.load(network.model_file, provider=provider, threads=1)
    engine.check_golden_set()
    session = _open_bare_session(network.original_file, provider)
    for batch in options.batches:
        calls = _make_calls(engine, session, batch, PROVIDERS[provider].is_gpu)
        _compare_answers(calls)
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                rates[name].append(batch * _measure_call_rate(call, turn_seconds))
        yield TensorRates(arithmetic, batch, rates)


def _open_bare_session(file: Path, provider: ProviderName) -> Any:
    """Open a session as tutorials do, with one CPU thread as the engine has.

    Raises `BenchError` if the session does not get the provider.
    """
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    names = [provider, *PROVIDERS[provider].fallbacks]
    runtime_names = [PROVIDERS[name].runtime_name for name in names]
    session = onnxruntime.InferenceSession(file, session_options, providers=runtime_names)
    if session.get_providers()[0] != PROVIDERS[provider].runtime_name:
        raise BenchError(f"bare ONNX Runtime does not run on {provider}")
    return session


def _make_calls(engine: Engine, session: Any, batch: int, is_gpu: bool) -> dict[str, Callable[[], Any]]:
    """Return a function for each contestant that classifies one batch and returns its logits."""
    pixel_tensor, raw_tensor = engine.tensors
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (batch, *pixel_tensor.shape), np.uint8)
    values = random.normal(0, 1, (batch, *raw_tensor.shape)).astype(raw_tensor.dtype)
    (model_input,), (model_output,) = session.get_inputs(), session.get_outputs()
    device = "cuda" if is_gpu else "cpu"
    binding = session.io_binding()
    binding.bind_ortvalue_input(model_input.name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0))
    binding.bind_output(model_output.name, device)

    def run_pixels() -> Any:
        images = engine.allocate_batch(pixels.shape, pixels.dtype)
        images[...] = pixels  # the service copies each image into the batch after it is decoded
        return engine.run_tensor(pixel_tensor, images)

    def run_on_chip() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return dict(
        zip(
            CONTESTANTS,
            (
                lambda: session.run(None, {model_input.name: values})[0],
                lambda: engine.run_tensor(raw_tensor, values, with_logits=True)[1],
                run_pixels,
                run_on_chip,
            ),
            strict=True,
        )
    )


def _compare_answers(calls: dict[str, Callable[[], Any]]) -> None:
    """Call everything twice, which also warms it up. Raises `BenchError` if logits differ."""
    answers = [[call() for call in calls.values()] for _ in range(2)]
    bare, fovea = (np.asarray(logits, np.float32) for logits in answers[-1][:2])
    difference = np.abs(bare - fovea).max() / max(1.0, np.abs(bare).max())
    if not difference < 5e-3:
        raise BenchError(f"Fovea's logits differ from bare ONNX Runtime's by {difference:.2g} of the largest")


def _measure_call_rate(call: Callable[[], Any], seconds: float) -> float:
    """Return the calls per second."""
    count, started_at = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started_at) < seconds or not count:
        call()
        count += 1
    return count / elapsed


# --- from JPEG files -----------------------------------------------------------------------------


def measure_service(
    network: ImportedNetwork, arithmetic: str, provider: ProviderName, seconds: float
) -> EndToEnd:
    """Load the service with photographs on all processors. Raises `BenchError` if it does not start."""
    images = [path.read_bytes() for path in WORKLOADS["photographs"].images]
    callers = min(256, 8 * len(os.sched_getaffinity(0)))
    with start_service(network.repository, FOVEA_PROVIDER=provider, FOVEA_DRAIN_GRACE="0") as (host, port):
        root = f"http://{host}:{port}"
        run_closed_loop(f"{root}/v1/classify", images, callers=callers, seconds=seconds / 5)
        before = read_metrics(f"{root}/metrics")
        result = run_closed_loop(f"{root}/v1/classify", images, callers=callers, seconds=seconds)
        after = read_metrics(f"{root}/metrics")

    def get_increase(name: str, stage: str) -> float:
        key = (f"fovea_stage_seconds_{name}", (("stage", stage),))
        return after[key] - before[key]

    decode, model = get_increase("sum", "decode"), get_increase("sum", "inference")
    return EndToEnd(
        arithmetic,
        rate=result.answer_rate(max_latency=float("inf")),
        failed=len(result.planned_times) - result.statuses.get(200, 0),
        decode_seconds=decode / (get_increase("count", "decode") or 1),
        decode_share=decode / ((decode + model) or 1),
        client_share=result.cpu_seconds / result.seconds,
    )


# --- display -------------------------------------------------------------------------------------


def _show_tables(
    tensor_rates: list[TensorRates], services: list[EndToEnd], options: argparse.Namespace
) -> None:
    """Print Markdown for docs/benchmarks.md."""
    print(f"\n{_describe_machine(options)}\n")
    print(f"| arithmetic | batch | {', images/s | '.join(CONTESTANTS)}, images/s | Fovea, tensors / bare |")
    print("|---" * (3 + len(CONTESTANTS)) + "|")
    print("\n".join(map(_format_rates, tensor_rates)))
    print(
        "\n| arithmetic | from JPEG, images/s | failed | decoding, ms per image | share of the runners' work "
        "| client, share of a processor | limit |\n|---|---|---|---|---|---|---|"
    )
    for one in services:
        limit = describe_limit(one, tensor_rates, is_gpu=PROVIDERS[options.provider].is_gpu)
        print(
            f"| {one.arithmetic} | {one.rate:.0f} | {one.failed} | {1e3 * one.decode_seconds:.2f} "
            f"| {one.decode_share:.0%} | {one.client_share:.0%} | {limit} |"
        )


def _format_rates(rates: TensorRates) -> str:
    medians = " | ".join(f"{rates.median(name):.0f}" for name in CONTESTANTS)
    bare, fovea = (rates.rates[name] for name in CONTESTANTS[:2])
    ratios = sorted(one / other for one, other in zip(fovea, bare, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {rates.arithmetic} | {rates.batch} | {medians} | {ratio} |"


def describe_limit(service: EndToEnd, tensor_rates: Sequence[TensorRates], *, is_gpu: bool) -> str:
    """Return what limits the service: decoding on all processors, or the model at its best batch size.

    On a CPU both share the processors, and the larger share is the limit.
    """
    cpus = len(os.sched_getaffinity(0))
    decode_rate = cpus / (service.decode_seconds or float("inf"))
    model_rate = max(
        (one.median("Fovea, pixels") for one in tensor_rates if one.arithmetic == service.arithmetic),
        default=float("nan"),
    )
    if not is_gpu:
        return "decoding" if service.decode_share > 0.5 else "the model"
    part = "decoding" if decode_rate < model_rate else "the model"
    return f"{part}: {cpus} processors decode at most {decode_rate:.0f}/s, the model takes {model_rate:.0f}/s"


def _describe_machine(options: argparse.Namespace) -> str:
    """Return chip, driver, versions and date in one line."""
    return (
        f"{options.network} on {options.provider}: {_describe_chip()}, "
        f"{len(os.sched_getaffinity(0))} processors, "
        f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{datetime.datetime.now(datetime.UTC).date()}; medians of {ROUNDS} rounds."
    )


def _describe_chip() -> str:
    """Return name and driver of the GPUs, or the name of the processor."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        return f"{names[0].partition(': ')[2] if names else platform.machine()}, no GPU"
    return "; ".join(
        f"{name}, driver {driver}" for name, driver in (one.split(", ") for one in lines.splitlines())
    )


if __name__ == "__main__":
    sys.exit(main())
