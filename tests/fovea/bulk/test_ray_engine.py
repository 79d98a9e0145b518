"""`--engine ray` on real clusters on this machine: the rows of the local engine, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from fovea.bulk import ray_driver
from fovea.bulk.local_engine import LocalEngine
from fovea.bulk.ray_engine import RayEngine, Window
from fovea.bulk.ray_messages import TaskResult
from fovea.bulk.ray_window import start_heartbeats
from fovea.bulk.ray_worker import Heartbeats
from fovea.bulk.rows import Row
from fovea.errors import StartError
from fovea.service.settings import load_settings
from tests.commands import Command
from tests.fovea.bulk.slow_entries import DeadlyEntry, FileEntry, HangingEntry, SlowEntry
from tests.fovea.bulk.tables import read_table
from tests.pictures import make_jpeg
from tests.servers import ROOT
from tests.tools import SYSTEM_REASON

ray = pytest.importorskip("ray", reason=f"{SYSTEM_REASON}has no Ray: pip install 'fovea-serve[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
"""Ray warns of many things."""

STORE = 100 << 20
"""Memory of a node's object store in bytes; Ray takes no less than 75 MiB."""

_T = TypeVar("_T")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a cluster of a head without processors, to which tests add workers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    instance = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        yield instance
    finally:
        instance.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the paths of 400 images, one of them broken, and one of no image."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index:03}.jpg" for index in range(400)]
    for index, path in enumerate(paths):
        path.write_bytes(make_jpeg(40 + index % 30, 32, index))
    paths[7].write_bytes(make_jpeg()[:200])
    (folder / "notes.txt").write_text("no image")
    return [*paths, folder / "notes.txt"]


class Engines:
    """Both engines with the same model and options."""

    def __init__(self, zoo: Path) -> None:
        self._settings = load_settings(models=zoo)
        self.local = LocalEngine.load(self._settings, None, top_k=3, coverage=0.9)

    def create_ray(self, address: str | None) -> RayEngine:
        engine = RayEngine.load(self._settings, None, top_k=3, coverage=0.9, address=address)
        assert engine.facts == self.local.facts
        assert engine.chunk_size == self.local.chunk_size
        return engine


@pytest.fixture
def engines(small_zoo: Path) -> Engines:
    return Engines(small_zoo)


def cut(values: Sequence[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


def classify(engine: Any, entries: Sequence[FileEntry]) -> list[Row | None]:
    chunks = list(engine.classify(cut(entries, engine.chunk_size)))
    assert [name for chunk in chunks for name in chunk.names] == [entry.name for entry in entries]
    return [row for chunk in chunks for row in chunk.rows]


def check_equal(rows: Sequence[Row | None], expected_rows: Sequence[Row | None]) -> None:
    """Check that rows differ by at most 1e-5 in probabilities, and in nothing else."""
    assert len(rows) == len(expected_rows)
    for row, expected in zip(rows, expected_rows, strict=True):
        if row is None or expected is None:
            assert row is expected
            continue
        floats = {"probability", "probabilities", "known_score"}
        for name, value, expected_value in zip(Row._fields, row, expected, strict=True):
            assert value == (pytest.approx(expected_value, abs=1e-5) if name in floats else expected_value)


def wait_for_workers(folder: Path, count: int) -> list[int]:
    """Return the ids of the processes that read slow entries, once there are so many."""
    deadline = time.monotonic() + 60
    while len(names := list(folder.glob("reading-*"))) < count:
        assert time.monotonic() < deadline, names
        time.sleep(0.05)
    return [int(name.name.removeprefix("reading-")) for name in names]


def find_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_rows_are_the_local_ones_though_a_worker_node_dies(
    cluster: Any, engines: Engines, images: list[Path], tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    expected = classify(engines.local, [FileEntry(path) for path in images])
    entries = [
        FileEntry(path) if index < 64 else SlowEntry(path, folder=tmp_path)
        for index, path in enumerate(images)
    ]
    engine = engines.create_ray(cluster.address)
    results = engine.classify(cut(entries, engine.chunk_size))
    rows = [*next(results).rows]  # from now on the run is in the middle
    raylets = {find_parent(pid) for pid in wait_for_workers(tmp_path, 2)}
    assert raylets == {node.all_processes["raylet"][0].process.pid for node in nodes}  # both nodes work
    cluster.remove_node(nodes[1], allow_graceful=False)
    (tmp_path / "gate").touch()
    rows += [row for chunk in results for row in chunk.rows]
    check_equal(rows, expected)
    assert [row is None for row in rows] == [False] * 400 + [True]
    assert rows[7] is not None
    assert rows[7].error == "bad_image"


@pytest.mark.parametrize("cpus", [1, 2])
def test_cluster_of_its_own_does_not_hang(
    cpus: int, engines: Engines, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors on two processors hung where reading was a task of its own, which got no processor."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("fovea.service.resources.threads.available_cpus", lambda: float(cpus))
    entries = [FileEntry(path) for path in images]
    check_equal(classify(engines.create_ray(None), entries), classify(engines.local, entries))


def test_client_of_a_cluster_gets_the_same_rows(
    engines: Engines, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray://` reaches a cluster through its head alone, as from a notebook."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    head = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**head, "ray_client_server_port": port}
    )
    try:
        entries = [FileEntry(path) for path in images]
        rows = classify(engines.create_ray(f"ray://127.0.0.1:{port}"), entries)
        check_equal(rows, classify(engines.local, entries))
    finally:
        cluster.shutdown()


def test_command_writes_the_same_table(
    cluster: Any, command: Command, small_zoo: Path, images: list[Path], tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    words = ["classify", images[0].parent, "--models", small_zoo]
    for name, more in {"local": [], "ray": ["--engine", "ray", "--address", cluster.address]}.items():
        assert command(*words, "--out", tmp_path / f"{name}.parquet", *more) == 0
    check_equal(read_table(tmp_path / "ray.parquet"), read_table(tmp_path / "local.parquet"))


def test_cluster_without_processors_is_a_sentence(cluster: Any, engines: Engines, images: list[Path]) -> None:
    with pytest.raises(StartError, match=r"^the Ray cluster has 0 processors \(CPU\); it needs 1 or more$"):
        classify(engines.create_ray(cluster.address), [FileEntry(images[0])])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_at_the_address_is_a_sentence(address: str, engines: Engines, images: list[Path]) -> None:
    with pytest.raises(StartError, match=rf"^no Ray cluster answers at {address}: Connection refused"):
        classify(engines.create_ray(address), [FileEntry(images[0])])


def test_image_that_ends_every_worker_ends_the_run_with_a_sentence(
    cluster: Any, engines: Engines, images: list[Path]
) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    with pytest.raises(
        StartError, match=r"^a worker of the Ray cluster died 5 times, which an image may have caused: "
    ):
        classify(engines.create_ray(cluster.address), [FileEntry(images[0]), DeadlyEntry(images[1])])


def test_lost_cluster_is_a_sentence_and_finished_rows_have_come(
    cluster: Any, engines: Engines, images: list[Path], tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    entries = [
        FileEntry(path) if index < 64 else SlowEntry(path, folder=tmp_path)
        for index, path in enumerate(images)
    ]
    engine = engines.create_ray(cluster.address)
    results = engine.classify(cut(entries, engine.chunk_size))
    first = next(results)
    assert first.rows[0]
    wait_for_workers(tmp_path, 1)
    for process in (node, cluster.head_node):
        process.kill_all_processes(check_alive=False, allow_graceful=False)
    with pytest.raises(StartError, match=r"connection to the Ray cluster"):
        list(results)


def test_slow_task_goes_on_and_one_that_hangs_or_waits_for_processors_ends(
    cluster: Any, engines: Engines, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other half of the processors is reserved by somebody else, as in any busy cluster."""
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    job = engines.create_ray(cluster.address)._job
    window = Window(cut([HangingEntry(path, folder=tmp_path) for path in images[:16]], 8), 16)
    ours, theirs = multiprocessing.Pipe()
    patience = 8.0  # longer than the time between heartbeats
    monkeypatch.setattr(ray_driver, "_PATIENCE", patience)
    ray.init(cluster.address, logging_level="error", log_to_driver=False)
    try:
        driver = ray_driver._Driver(job, theirs)
        driver._heartbeats = start_heartbeats()
        content = ray.put(np.frombuffer(job.content, np.uint8))
        thread = threading.Thread(target=driver._run_window, args=(list(window), content))
        thread.start()
        wait_for_workers(tmp_path, 1)
        reservations = [reserve_half_a_processor()]
        time.sleep(patience + 2)
        assert driver._find_problem() is None  # nothing is free, but a worker is alive
        with monkeypatch.context() as patch:
            patch.setattr(ray_driver, "_HANG_SECONDS", patience)
            problem = driver._find_problem()
        assert problem is not None
        assert re.search(rf"no result for \d+ s; the first images .* are '{images[0]}', ", problem)
        (tmp_path / "gate").touch()
        thread.join()
        assert isinstance(ours.recv(), TaskResult)
        assert driver._find_problem() is None
        reservations.append(reserve_half_a_processor())  # that of the worker
        driver._is_running = True
        time.sleep(patience + 2)
        assert "1 of its 1 processors are reserved, and Fovea's" in (driver._find_problem() or "")
        assert len(reservations) == 2
    finally:
        ray.shutdown()


def reserve_half_a_processor() -> Any:
    """Return an actor that reserves half a processor, once it has found a place."""
    actor = ray.remote(Heartbeats).options(num_cpus=0.5).remote()
    ray.get(actor.beat.remote(), timeout=60)
    return actor


def test_closed_run_leaves_no_process(
    engines: Engines, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    entries = [
        FileEntry(path) if index < 64 else SlowEntry(path, folder=tmp_path)
        for index, path in enumerate(images)
    ]
    engine = engines.create_ray(None)
    results = engine.classify(cut(entries, engine.chunk_size))
    next(results)
    (worker, *_) = wait_for_workers(tmp_path, 1)
    raylet = find_parent(worker)
    results.close()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in (worker, raylet)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return find_state(pid) != "Z"


def find_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
