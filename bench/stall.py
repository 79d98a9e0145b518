"""The `make stall` benchmark: the delay of other clients while several kinds of JSON are read.

orjson blocks everything else in its process. One connection repeatedly asks for `/health/live`. The longest
answer time while a body is read is the stall. The table gives the median over the bodies of each kind.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import statistics
import sys
import time
from typing import Final

import orjson

from fovea.bench.mixed import describe_machine
from fovea.bench.oip import start_service
from fovea.bench.probe import probe_service
from fovea.bench.workloads import ROOT

_BODY_BYTES: Final = (4 << 20) - 64
"""Default `FOVEA_JSON_BYTES`, in bytes, less room for the text around the values."""

_PATH: Final = "/v1/models/cifar10:predict"


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.stall", description=__doc__)
    parser.add_argument("--requests", type=int, default=10, help="bodies of each kind (default: 10)")
    requests = parser.parse_args().requests
    print("| body | MB | status | others wait, median ms | longest |\n|---|---|---|---|---|")
    with start_service(ROOT / "zoo", FOVEA_DEFAULT_MODEL="cifar10") as (host, port):
        for name, body in _build_bodies().items():
            status, waits = _measure_stalls(host, port, body, requests)
            median, longest = 1000 * statistics.median(waits), 1000 * max(waits)
            print(f"| {name} | {len(body) / 1e6:.2f} | {status} | {median:.0f} | {longest:.0f} |")
    print(f"\n{describe_machine()}.")
    return 0


def _build_bodies() -> dict[str, bytes]:
    photo = (ROOT / "samples" / "ship.jpg").read_bytes().ljust(_BODY_BYTES // 4 * 3 - 64, b"\0")
    images = [[[[123] * 3] * 32] * 32] * 61
    return {
        "a photo in base64": orjson.dumps({"instances": [{"b64": base64.b64encode(photo).decode()}]}),
        "pixels of 61 images of 32 x 32, nested": orjson.dumps({"instances": images}),
        "numbers in one list": _fill_list(b'{"instances": [', b"1"),
        "empty objects": _fill_list(b'{"instances": [', b"{}"),
        "an object with many names": b'{"x": {%b}}'
        % b",".join(b'"%06x":0' % n for n in range(_BODY_BYTES // 11)),
        "empty lists": _fill_list(b'{"instances": [', b"[]"),
    }


def _fill_list(head: bytes, value: bytes) -> bytes:
    return head + b",".join([value] * (_BODY_BYTES // (len(value) + 1))) + b"]}"


def _measure_stalls(host: str, port: int, body: bytes, requests: int) -> tuple[int, list[float]]:
    """Return the status, and the longest wait of others during each body, in seconds."""
    longest = []
    with probe_service(host, port) as waits:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        for _ in range(requests):
            probe_count = len(waits)
            connection.request("POST", _PATH, body)
            reply = connection.getresponse()
            reply.read()
            last_count = len(waits) + 2  # the running probe and one more
            while len(waits) < last_count:
                time.sleep(0.001)
            longest.append(max(waits[probe_count:]))
    return reply.status, longest


if __name__ == "__main__":
    sys.exit(main())
