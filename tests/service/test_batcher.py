"""Greedy batching, without HTTP and without images."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.batcher import Batcher, Row
from service.metrics import Metrics


class Gate:
    """A model that doubles its rows, and waits at a gate while it is closed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.sizes: list[int] = []

    def __call__(self, batch: Row) -> Row:
        self.sizes.append(len(batch))
        self.entered.release()
        if not self.open.wait(timeout=10):
            raise TimeoutError
        if (batch == 13).any():
            raise ArithmeticError("thirteen")
        return batch * 2


@contextmanager
def batcher(run: Callable[[Row], Row], runners: int = 1, batch_max: int = 4) -> Iterator[Batcher]:
    made = Batcher(run, runners=runners, batch_max=batch_max, metrics=Metrics(CollectorRegistry()))
    try:
        yield made
    finally:
        made.close()


def finish(test: Coroutine[None, None, None]) -> None:
    """Run to the end, or fail: a caller who is never answered must not hang the tests."""

    async def limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(limited())


async def enter(gate: Gate) -> None:
    """Wait until the model has been called once more."""
    assert await asyncio.to_thread(gate.entered.acquire, True, 10)


def row(value: int) -> Row:
    return np.array([value])


def test_each_caller_gets_its_own_row() -> None:
    gate = Gate()

    async def run() -> None:
        with batcher(gate, runners=2) as batches:
            answers = await asyncio.gather(*(batches.submit(row(i)) for i in range(14, 114)))
        assert [int(answer[0]) for answer in answers] == [2 * i for i in range(14, 114)]

    finish(run())
    assert max(gate.sizes) <= 4


def test_what_waits_goes_together_and_nobody_waits_for_company() -> None:
    gate = Gate()

    async def run() -> None:
        with batcher(gate) as batches:
            gate.open.clear()
            first = asyncio.create_task(batches.submit(row(1)))
            await enter(gate)
            assert gate.sizes == [1]
            others = [asyncio.create_task(batches.submit(row(i))) for i in range(2, 9)]
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(first, *others)
        assert gate.sizes == [1, 4, 3]

    finish(run())


def test_a_caller_who_leaves_costs_no_inference_and_harms_no_neighbour() -> None:
    gate = Gate()

    async def run() -> None:
        with batcher(gate) as batches:
            gate.open.clear()
            first = asyncio.create_task(batches.submit(row(1)))
            await enter(gate)
            leaves = asyncio.create_task(batches.submit(row(2)))
            stays = asyncio.create_task(batches.submit(row(3)))
            await asyncio.sleep(0)
            leaves.cancel()
            first.cancel()
            await asyncio.sleep(0)
            gate.open.set()
            assert int((await stays)[0]) == 6
        assert gate.sizes == [1, 1]

    finish(run())


def test_a_model_that_raises_reaches_its_batch_alone() -> None:
    async def run() -> None:
        with batcher(Gate()) as batches:
            with pytest.raises(ArithmeticError, match="thirteen"):
                await batches.submit(row(13))
            assert int((await batches.submit(row(4)))[0]) == 8

    finish(run())


def test_the_drain_time_grows_with_what_waits() -> None:
    async def run() -> None:
        with batcher(Gate()) as batches:
            assert batches.drain_seconds(100) == 0
            await batches.submit(row(1))
            assert batches.drain_seconds(200) == pytest.approx(2 * batches.drain_seconds(100))
            assert batches.drain_seconds(100) > 0

    finish(run())


def test_queue_and_batches_are_counted() -> None:
    registry = CollectorRegistry()

    async def run() -> None:
        made = Batcher(Gate(), runners=1, batch_max=4, metrics=Metrics(registry))
        await asyncio.gather(*(made.submit(row(i)) for i in range(1, 6)))
        made.close()

    finish(run())
    assert registry.get_sample_value("fovea_queue_images") == 0
    assert registry.get_sample_value("fovea_batch_images_sum") == 5
    assert registry.get_sample_value("fovea_stage_seconds_count", {"stage": "queue"}) == 5
    inferences = registry.get_sample_value("fovea_stage_seconds_count", {"stage": "inference"})
    assert inferences == registry.get_sample_value("fovea_batch_images_count")
