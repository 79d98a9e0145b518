"""A real Prometheus scrapes the service: each counter equals the number of answers that clients counted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.pictures import make_jpeg
from tests.servers import Server, wait_until

pytestmark = [pytest.mark.needs("prometheus"), pytest.mark.long]

CONFIG = """
global: {scrape_interval: 1s, scrape_timeout: 1s}
scrape_configs: [{job_name: fovea, static_configs: [{targets: ["ADDRESS"]}]}]
"""

GOOD = make_jpeg()
CLASSIFY = "/v1/classify"


class Prometheus:
    """A server that scrapes every second."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, query: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Return the current values by labels."""
        reply = httpx.get(f"{self._url}/api/v1/query", params={"query": query}).json()
        return {
            tuple(sorted(sample["metric"].items())): float(sample["value"][1])
            for sample in reply["data"]["result"]
        }

    def wait_for_scrape(self) -> None:
        """Wait for a scrape that began after this call."""
        now = time.time()
        wait_until(lambda: max(self.query("timestamp(up)").values(), default=0.0) > now)

    def query_counts(self, query: str, label: str) -> dict[str, int]:
        """Return a counter's values by one label, without values of 0."""
        values = {dict(labels)[label]: int(value) for labels, value in self.query(query).items()}
        return {key: value for key, value in values.items() if value}


@contextmanager
def run_prometheus(server: Server, folder: Path) -> Iterator[Prometheus]:
    config = CONFIG.replace("ADDRESS", server.url.removeprefix("http://"))
    (folder / "prometheus.yml").write_text(config)
    options = {
        "config.file": "prometheus.yml",
        "storage.tsdb.path": "data",
        "web.listen-address": "127.0.0.1:0",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stderr=log) as process:
        try:
            wait_until(lambda: _read_address(folder / "log"))
            prometheus = Prometheus(f"http://{_read_address(folder / 'log')}")
            prometheus.wait_for_scrape()
            yield prometheus
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _read_address(log: Path) -> str:
    """Return the address on which the server listens; empty until it listens."""
    address_match = re.search(r'Listening on" address=(\S+)', log.read_text())
    return address_match[1] if address_match else ""


# --- clients -------------------------------------------------------------------------------------


@dataclass
class ClientCounts:
    """The answers that clients have received. Several threads add to them."""

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, reply: httpx.Response) -> None:
        body = reply.json()
        with self.lock:
            self.statuses[str(reply.status_code)] += 1
            for result in body.get("results", [body]):
                if "error" in result:
                    self.errors[result["error"]["code"]] += 1
                else:
                    self.labels[result["predictions"][0]["label"]] += 1


def post_good(client: httpx.Client) -> httpx.Response:
    return client.post(CLASSIFY, content=GOOD)


def post_truncated(client: httpx.Client) -> httpx.Response:
    return client.post(CLASSIFY, content=GOOD[:300])


def post_text(client: httpx.Client) -> httpx.Response:
    return client.post(CLASSIFY, content=b"not an image")


def post_huge(client: httpx.Client) -> httpx.Response:
    return client.post(CLASSIFY, content=bytes(30_000))


def post_misspelt(client: httpx.Client) -> httpx.Response:
    return client.post(f"{CLASSIFY}?top_k=many", content=GOOD)


def post_mixed(client: httpx.Client) -> httpx.Response:
    images = [GOOD, b"no image", make_jpeg(seed=1), GOOD[:300], make_jpeg(seed=2)]
    return client.post(CLASSIFY, files=[("image", (str(index), image)) for index, image in enumerate(images)])


def post_json(client: httpx.Client) -> httpx.Response:
    return client.post(
        CLASSIFY, content=json.dumps({"images": 7}), headers={"Content-Type": "application/json"}
    )


KINDS = (
    post_good,
    post_good,
    post_good,
    post_truncated,
    post_text,
    post_huge,
    post_misspelt,
    post_mixed,
    post_json,
)
REQUESTS = 500
CALLERS = 8


def send_requests(server: Server, counts: ClientCounts, requests: int, seed: int) -> None:
    """Send requests of all kinds, in an order by the seed, on one connection while it lasts."""
    generator = random.Random(seed)  # noqa: S311
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(requests):
            try:
                counts.add(generator.choice(KINDS)(client))
            except httpx.TransportError:
                with counts.lock:
                    counts.lost += 1


@contextmanager
def run_callers(server: Server, counts: ClientCounts) -> Iterator[None]:
    shares = [REQUESTS // CALLERS + (caller < REQUESTS % CALLERS) for caller in range(CALLERS)]
    callers = [
        threading.Thread(target=send_requests, args=(server, counts, share, seed))
        for seed, share in enumerate(shares)
    ]
    for caller in callers:
        caller.start()
    yield
    for caller in callers:
        caller.join()


def make_server(small_zoo: Path, workers: int) -> Server:
    return Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS=str(workers), FOVEA_BODY_BYTES="20000")


REQUESTS_BY_STATUS = f'sum by (status) (fovea_requests_total{{route="{CLASSIFY}"}})'
ERRORS_BY_REASON = "sum by (reason) (fovea_errors_total)"
IMAGES_BY_LABEL = "sum by (label) (fovea_predictions_total)"


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_counters_equal_answers_that_clients_received(small_zoo: Path, tmp_path: Path, workers: int) -> None:
    client_counts = ClientCounts()
    with make_server(small_zoo, workers) as server, run_prometheus(server, tmp_path) as prometheus:
        with run_callers(server, client_counts):
            pass
        assert client_counts.statuses.total() == REQUESTS
        assert len(client_counts.statuses) == 5
        prometheus.wait_for_scrape()
        assert prometheus.query_counts(REQUESTS_BY_STATUS, "status") == client_counts.statuses
        assert prometheus.query_counts(ERRORS_BY_REASON, "reason") == client_counts.errors
        assert prometheus.query_counts(IMAGES_BY_LABEL, "label") == client_counts.labels
        for query in ("sum(fovea_images_total)", "sum(fovea_prediction_confidence_count)"):
            assert list(prometheus.query(query).values()) == [client_counts.labels.total()]
        duration_counts = prometheus.query(f'sum(fovea_request_seconds_count{{route="{CLASSIFY}"}})')
        assert list(duration_counts.values()) == [REQUESTS]


def test_killed_worker_miscounts_only_requests_in_flight(small_zoo: Path, tmp_path: Path) -> None:
    client_counts = ClientCounts()
    with make_server(small_zoo, 3) as server, run_prometheus(server, tmp_path) as prometheus:
        supervisor = server.process.pid
        workers = list(map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()))
        with run_callers(server, client_counts):
            wait_until(lambda: client_counts.statuses.total() > REQUESTS // 4)
            os.kill(workers[1], signal.SIGKILL)
        assert client_counts.statuses.total() + client_counts.lost == REQUESTS
        assert client_counts.lost <= CALLERS
        wait_until(lambda: server.read_metric("fovea_model_info") == 1)
        prometheus.wait_for_scrape()
        scraped_counts = prometheus.query_counts(REQUESTS_BY_STATUS, "status")
        for status, count in client_counts.statuses.items():
            assert count <= scraped_counts[status] <= count + client_counts.lost
        assert 0 <= sum(scraped_counts.values()) - client_counts.statuses.total() <= client_counts.lost
        scraped_images = sum(prometheus.query("sum(fovea_images_total)").values())
        assert 0 <= scraped_images - client_counts.labels.total() <= 5 * client_counts.lost
