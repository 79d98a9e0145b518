"""TLS beside plain HTTP: images per second of one service each, by turns.

Both services run the default model with the same settings. wrk posts the same images over connections that
stay open. wrk shares the processors with the service, and its own part of TLS counts too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.bench.cells import run_wrk
from fovea.bench.processes import start_process
from fovea.bench.workloads import ROOT, BenchError, draw_picture

_SIZES: Final = {"thumbnail 32 x 32": (32, 32), "photograph 500 x 375": (500, 375)}

_IMAGE_COUNT: Final = 64

_CONNECTIONS: Final = (1, 8, 32)


@dataclass(frozen=True)
class Row:
    """The rates of one load, in images per second and round."""

    images: str
    connections: int
    plain: list[float]
    encrypted: list[float]

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios of TLS to plain HTTP."""
        return statistics.median(
            encrypted / plain for plain, encrypted in zip(self.plain, self.encrypted, strict=True)
        )


def main() -> int:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.tls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each load (default: 5)")
    parser.add_argument("--seconds", type=float, default=3, help="length of a measurement (default: 3)")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(_measure(Path(folder), options.rounds, options.seconds))
    except BenchError as error:
        print(f"tls: {error}", file=sys.stderr)
        return 2
    print("| images | connections | HTTP, images/s | HTTPS, images/s | ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.images} | {row.connections} | {statistics.median(row.plain):.0f}"
            f" | {statistics.median(row.encrypted):.0f} | {row.ratio:.2f} |"
        )
    return 0


def _measure(folder: Path, rounds: int, seconds: float) -> Iterator[Row]:
    with _start_service({}) as plain, _start_service(_create_certificate(folder)) as encrypted:
        for name, size in _SIZES.items():
            images = _write_images(folder, size)
            for url in (plain, encrypted):
                run_wrk(url, 8, 1, images)
            for connections in _CONNECTIONS:
                row = Row(name, connections, [], [])
                for number in range(rounds):
                    turns = [(plain, row.plain), (encrypted, row.encrypted)]
                    for url, rates in turns if number % 2 else reversed(turns):
                        report = run_wrk(url, connections, seconds, images)
                        if report["errors"] or report["refused"]:
                            raise BenchError(f"{url} has failed: {report}")
                        rates.append(report["requests"] / report["seconds"])
                yield row


def _create_certificate(folder: Path) -> dict[str, str]:
    """Write a certificate (ECDSA, P-256) and return the settings that name it. Raises `BenchError`."""
    try:
        import trustme
    except ImportError:
        raise BenchError("the benchmark needs trustme: pip install trustme") from None
    leaf = trustme.CA().issue_cert("127.0.0.1")
    certificate, key = folder / "tls.crt", folder / "tls.key"
    certificate.write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return {"FOVEA_TLS_CERT": str(certificate), "FOVEA_TLS_KEY": str(key)}


@contextmanager
def _start_service(settings: dict[str, str]) -> Iterator[str]:
    """Start a service and yield the URL of its default model."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_LOG_REQUESTS": "0", "FOVEA_DRAIN_GRACE": "0", **settings}
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE) as process:
        lines = [process.stdout.readline() if process.stdout else "" for _ in range(3)]
        if not lines[-1]:
            raise BenchError("the service did not start")
        yield lines[1].split()[-1]


def _write_images(folder: Path, size: tuple[int, int]) -> Path:
    """Write images, and return the file that lists them."""
    paths = []
    for seed in range(_IMAGE_COUNT):
        path = folder / f"{size[0]}-{seed}.jpg"
        draw_picture(size, seed).save(path, quality=90)
        paths.append(path)
    listing = folder / f"{size[0]}.txt"
    listing.write_text("".join(f"{path}\n" for path in paths))
    return listing


if __name__ == "__main__":
    sys.exit(main())
