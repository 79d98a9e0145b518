"""Greedy batching, without HTTP, images and processes."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batcher import LEVEL_COUNT, Batcher
from fovea.service.runners.lane import INFINITY, DropItem, Job, Lane
from fovea.service.runners.runner_interface import BatchCallback, RunnerLost


class Doubler:
    """A runner that doubles numbers, at once or at `finish_batch`. The number 13 fails its whole batch."""

    def __init__(self, *, is_multi_threaded: bool = False, is_automatic: bool = True) -> None:
        self.is_multi_threaded = is_multi_threaded
        self.batches: list[list[int]] = []
        self.exclusive: list[bool] = []
        self.separate: list[bool] = []
        self.memory: list[int] = []
        self.dropped: list[int] = []
        self._is_automatic = is_automatic
        self._running_batches: list[tuple[list[int], BatchCallback]] = []

    def start_batch(
        self,
        lane: Lane[Any, Any],
        items: Sequence[Any],
        deadlines: Sequence[float],
        *,
        exclusive: bool,
        separate: bool,
        memory: int,
        on_finish: BatchCallback,
    ) -> DropItem:
        self.batches.append(list(items))
        self.exclusive.append(exclusive)
        self.separate.append(separate)
        self.memory.append(memory)
        self._running_batches.append((list(items), on_finish))
        if self._is_automatic:
            asyncio.get_running_loop().call_soon(self.finish_batch)
        batch = len(self.batches) - 1
        return lambda index: self.dropped.append(self.batches[batch][index])

    def finish_batch(self) -> None:
        items, on_finish = self._running_batches.pop(0)
        if 13 in items:
            on_finish(ArithmeticError("thirteen"))
        else:
            on_finish([ValueError("odd") if item == 7 else 2 * item for item in items])

    @property
    def is_busy(self) -> bool:
        return bool(self._running_batches)

    @property
    def reserved(self) -> int:
        return sum(self.memory[len(self.memory) - len(self._running_batches) :])

    def die(self) -> None:
        while self._running_batches:
            _, on_finish = self._running_batches.pop()
            on_finish(RunnerLost("killed", is_suspect=not self._running_batches))


def make_lane(batch_max: int = 4, *, is_shared: bool = False, **options: Any) -> Lane[int, int]:
    return Lane(model_id=0, batch_max=batch_max, split_evenly=is_shared, **options)


def make_batcher(*runners: Doubler, memory: float = INFINITY) -> Batcher:
    new_batcher = Batcher(Metrics(CollectorRegistry()), memory=memory)
    for runner in runners:
        new_batcher.add_runner(runner)
    return new_batcher


def run_test(test: Coroutine[None, None, None]) -> None:
    """Run a test with a time limit: a caller who is never answered must not block the tests."""

    async def run_limited() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(run_limited())


async def run_ready_callbacks() -> None:
    """Let the event loop run all callbacks that are ready."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_each_caller_gets_its_own_result() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler()
        batcher = make_batcher(runner, Doubler())
        answers = await asyncio.gather(*(batcher.submit(i, lane) for i in range(14, 114)))
        assert answers == [2 * i for i in range(14, 114)]
        assert max(map(len, runner.batches)) == 4

    run_test(run())


def test_waiting_items_are_batched_without_delay() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        batcher.submit(1, lane)
        await run_ready_callbacks()
        for i in range(2, 9):
            batcher.submit(i, lane)
        for _ in range(3):
            await run_ready_callbacks()
            runner.finish_batch()
        assert runner.batches == [[1], [2, 3, 4, 5], [6, 7, 8]]

    run_test(run())


def test_simultaneous_items_are_split_among_free_runners() -> None:
    async def run() -> None:
        lane = make_lane(is_shared=True)
        first_runner, second_runner = Doubler(is_automatic=False), Doubler(is_automatic=False)
        batcher = make_batcher(first_runner, second_runner)
        for i in range(8):
            batcher.submit(i, lane)
        await run_ready_callbacks()
        assert (first_runner.batches, second_runner.batches) == ([[0, 1], [4, 5]], [[2, 3], [6], [7]])

    run_test(run())


def test_lone_item_runs_exclusively_on_the_wide_runner() -> None:
    async def run() -> None:
        lane, narrow_runner = make_lane(), Doubler(is_automatic=False)
        wide_runner = Doubler(is_multi_threaded=True, is_automatic=False)
        batcher = make_batcher(narrow_runner, wide_runner)
        batcher.submit(1, lane)
        await run_ready_callbacks()
        batcher.submit(2, lane)
        await run_ready_callbacks()
        assert (wide_runner.exclusive, narrow_runner.exclusive) == ([True], [False])
        wide_runner.finish_batch()
        await run_ready_callbacks()
        batcher.submit(3, lane)
        await run_ready_callbacks()
        assert wide_runner.exclusive == [True, False]

    run_test(run())


def test_heavy_items_do_not_share_a_batch() -> None:
    async def run() -> None:
        lane, runner = make_lane(weigh=float, weight_max=10), Doubler()
        batcher = make_batcher(runner)
        await asyncio.gather(*(batcher.submit(i, lane) for i in (1, 2, 3, 9, 50, 1)))
        assert runner.batches == [[1, 2, 3], [9], [50], [1]]

    run_test(run())


def test_cancelled_item_is_not_run_and_others_are_answered() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        first_answer = batcher.submit(1, lane)
        await run_ready_callbacks()
        cancelled_answer, kept_answer = batcher.submit(2, lane), batcher.submit(3, lane)
        first_answer.cancel()
        cancelled_answer.cancel()
        runner.finish_batch()
        await run_ready_callbacks()
        runner.finish_batch()
        assert await kept_answer == 6
        assert runner.batches == [[1], [3]]

    run_test(run())


def test_cancelled_items_leave_the_queue_at_once() -> None:
    async def run() -> None:
        lane, runner = make_lane(1), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        first_answer = batcher.submit(1, lane)
        await run_ready_callbacks()
        batcher.submit(5, lane)
        await run_ready_callbacks()
        kept_answer = batcher.submit(2, lane)
        for i in range(100):
            batcher.submit(i, lane).cancel()
        first_answer.cancel()
        await run_ready_callbacks()
        assert [job.item for job in lane.jobs] == [2]
        for _ in range(3):
            runner.finish_batch()
            await run_ready_callbacks()
        assert await kept_answer == 4

    run_test(run())


def test_runner_queues_one_batch_behind_another() -> None:
    async def run() -> None:
        lane, runner = make_lane(2), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        for i in range(8):
            batcher.submit(i, lane)
            await run_ready_callbacks()
        assert runner.batches == [[0], [1], [2], [3]]
        runner.finish_batch()
        assert runner.batches[4:] == [[4, 5]]

    run_test(run())


def test_heavy_item_counts_as_a_full_batch() -> None:
    async def run() -> None:
        lane = make_lane(4, weigh=float, weight_max=10.0)
        first_runner, second_runner = Doubler(is_automatic=False), Doubler(is_automatic=False)
        batcher = make_batcher(first_runner, second_runner)
        for weight in (100, 101, 102, 103, 104, 105):
            batcher.submit(weight, lane)
        await run_ready_callbacks()
        assert (first_runner.batches, second_runner.batches) == ([[100], [102]], [[101], [103]])

    run_test(run())


def test_retried_items_are_marked_as_separate() -> None:
    async def run() -> None:
        lane, dying_runner, new_runner = make_lane(), Doubler(is_automatic=False), Doubler(is_automatic=False)
        batcher = make_batcher(dying_runner)
        for i in range(2):
            batcher.submit(i, lane)
        await run_ready_callbacks()
        batcher.remove_runner(dying_runner)
        dying_runner.die()
        batcher.add_runner(new_runner)
        await run_ready_callbacks()
        assert (dying_runner.separate, new_runner.separate) == ([False], [True, True])
        assert new_runner.batches == [[0], [1]]

    run_test(run())


def test_repr_does_not_show_items() -> None:
    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher()
        answer = batcher.submit(123_456_789, lane)
        assert "123456789" not in repr(answer)
        assert "123456789" not in repr(lane)

    run_test(run())


def test_runner_drops_item_cancelled_after_dispatch() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        batcher.submit(1, lane)
        await run_ready_callbacks()
        cancelled_answer = batcher.submit(2, lane)
        await run_ready_callbacks()
        cancelled_answer.cancel()
        await run_ready_callbacks()
        assert runner.dropped == [2]

    run_test(run())


def test_expired_item_is_not_run() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        batcher.submit(1, lane)
        await run_ready_callbacks()
        batcher.submit(2, lane, deadline=time.monotonic())
        batcher.submit(3, lane, deadline=time.monotonic() + 100)
        runner.finish_batch()
        await run_ready_callbacks()
        assert runner.batches == [[1], [3]]

    run_test(run())


def test_max_wait_delays_only_incomplete_batches() -> None:
    async def run() -> None:
        lane, runner = make_lane(max_wait=0.5), Doubler()
        batcher = make_batcher(runner)
        first_answer = batcher.submit(1, lane)
        await asyncio.sleep(0.01)
        second_answer = batcher.submit(2, lane)
        assert (await first_answer, await second_answer) == (2, 4)
        full_batch = [batcher.submit(i, lane) for i in range(3, 7)]
        await run_ready_callbacks()
        assert all(answer.done() for answer in full_batch), "a full batch waits for nobody"
        assert runner.batches == [[1, 2], [3, 4, 5, 6]]

    run_test(run())


def test_failed_item_fails_only_its_own_caller() -> None:
    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher(Doubler())
        failed_answer, other_answer = batcher.submit(7, lane), batcher.submit(8, lane)
        assert await other_answer == 16
        with pytest.raises(ValueError, match="odd"):
            await failed_answer

    run_test(run())


def test_failed_batch_does_not_affect_the_next_batch() -> None:
    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher(Doubler())
        with pytest.raises(ArithmeticError, match="thirteen"):
            await batcher.submit(13, lane)
        assert await batcher.submit(4, lane) == 8

    run_test(run())


def test_items_of_a_dead_runner_are_retried_one_by_one() -> None:
    async def run() -> None:
        lane, runner, next_runner = make_lane(), Doubler(is_automatic=False), Doubler()
        batcher = make_batcher(runner)
        answers = [batcher.submit(i, lane) for i in range(4)]
        await run_ready_callbacks()
        batcher.remove_runner(runner)
        runner.die()
        await run_ready_callbacks()
        batcher.add_runner(next_runner)
        assert await asyncio.gather(*answers) == [0, 2, 4, 6]
        assert next_runner.batches == [[0], [1], [2], [3]]

    run_test(run())


def test_item_that_kills_two_runners_fails() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        killer_answer, other_answer = batcher.submit(1, lane), batcher.submit(2, lane)
        for _ in range(2):
            await run_ready_callbacks()
            runner.die()
        await run_ready_callbacks()
        with pytest.raises(RunnerLost):
            await killer_answer
        runner.finish_batch()
        assert await other_answer == 4

    run_test(run())


def test_lanes_are_batched_separately_in_order_of_waiting() -> None:
    async def run() -> None:
        cat_lane, dog_lane, runner = make_lane(), make_lane(), Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        batcher.submit(1, dog_lane)
        await run_ready_callbacks()
        for i in (2, 3, 4):
            batcher.submit(i, dog_lane)
            batcher.submit(10 * i, cat_lane)
        for _ in range(3):
            runner.finish_batch()
            await run_ready_callbacks()
        assert runner.batches == [[1], [2, 3, 4], [20, 30, 40]]

    run_test(run())


def test_drain_time_is_proportional_to_the_queue() -> None:
    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher(Doubler())
        assert batcher.drain_seconds(100) == 0
        await batcher.submit(1, lane)
        assert batcher.drain_seconds(200) == pytest.approx(2 * batcher.drain_seconds(100))
        assert batcher.drain_seconds(100) > 0

    run_test(run())


def test_queue_length_and_time_are_measured() -> None:
    registry = CollectorRegistry()

    async def run() -> None:
        lane = make_lane()
        metrics = Metrics(registry)
        batcher = Batcher(metrics)
        answers = [batcher.submit(i, lane) for i in range(5)]
        await run_ready_callbacks()
        metrics.fold()
        assert registry.get_sample_value("fovea_queue_images") == 5
        batcher.add_runner(Doubler())
        await asyncio.gather(*answers)
        await run_ready_callbacks()
        metrics.fold()

    run_test(run())
    assert registry.get_sample_value("fovea_queue_images") == 0
    assert registry.get_sample_value("fovea_stage_seconds_count", {"stage": "queue"}) == 5


def test_raising_callback_does_not_affect_other_callers() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler()
        batcher = make_batcher(runner)
        outcomes: list[object] = []

        def record_outcome(outcome: object, _job: Job) -> None:
            outcomes.append(outcome)

        def raise_error(_outcome: object, _job: Job) -> None:
            raise OSError("the connection has been reset")

        for callback in (record_outcome, raise_error, record_outcome):
            batcher.enqueue(len(outcomes) + 1, lane, callback, deadline=INFINITY)
        assert await batcher.submit(5, lane) == 10
        assert outcomes == [2, 2]
        assert await batcher.submit(6, lane) == 12

    run_test(run())


def test_finished_jobs_leave_no_reference_cycles() -> None:
    async def run() -> None:
        lane, runner = make_lane(), Doubler()
        batcher = make_batcher(runner)
        gc.collect()
        gc.disable()
        try:
            await asyncio.gather(*(batcher.submit(i, lane) for i in (1, 2, 7)), return_exceptions=True)
            batcher.submit(8, lane).cancel()
            await run_ready_callbacks()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [garbage for garbage in gc.garbage if isinstance(garbage, Job | asyncio.Future)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run_test(run())


# --- exceptions in callbacks, runners and metrics ------------------------------------------------


def test_unreadable_outcome_fails_only_its_own_caller() -> None:
    def read_outcome(outcome: Any, job: Job) -> Any:
        if outcome == 4:
            raise ZeroDivisionError("of a metric")
        return outcome

    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher(Doubler())
        futures = [batcher.submit(item, lane, convert=read_outcome) for item in (1, 2, 3)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert (outcomes[0], outcomes[2]) == (2, 6)
        assert isinstance(outcomes[1], ZeroDivisionError)

    run_test(run())


def test_raising_callback_is_called_again_with_the_error() -> None:
    async def run() -> None:
        lane = make_lane()
        batcher = make_batcher(Doubler())
        outcomes: list[Any] = []
        error_received = asyncio.Event()

        def on_outcome(outcome: Any, job: Job) -> None:
            outcomes.append(outcome)
            if not isinstance(outcome, Exception):
                raise ZeroDivisionError("of an answer")
            error_received.set()

        batcher.enqueue(1, lane, on_outcome, deadline=INFINITY)
        await error_received.wait()
        assert outcomes[0] == 2
        assert isinstance(outcomes[1], ZeroDivisionError)

    run_test(run())


def test_unsendable_batch_fails_only_its_own_caller() -> None:
    class FailingRunner(Doubler):
        def start_batch(
            self, lane: Lane[Any, Any], items: Sequence[Any], *rest: Any, **options: Any
        ) -> DropItem:
            if 2 in items:
                raise TypeError("no JSON")
            return super().start_batch(lane, items, *rest, **options)

    async def run() -> None:
        lane = make_lane(batch_max=1)
        batcher = make_batcher(FailingRunner(), memory=100)
        # Each needs all the memory: that of the second must be free again for the third.
        futures = [batcher.submit(item, lane, memory=100) for item in (1, 2, 3)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert (outcomes[0], outcomes[2]) == (2, 6)
        assert isinstance(outcomes[1], TypeError)

    run_test(run())


def test_raising_metrics_do_not_affect_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*_: object) -> None:
        raise OSError("No space left on device")

    async def run() -> None:
        lane = make_lane()
        metrics = Metrics(CollectorRegistry(), is_shared=True)
        batcher = Batcher(metrics)
        batcher.add_runner(Doubler())
        monkeypatch.setattr(metrics.queue_images, "set", raise_error)
        monkeypatch.setattr(metrics.seconds_by_stage["queue"], "observe", raise_error)
        assert await batcher.submit(1, lane) == 2
        assert await batcher.submit(2, lane) == 4

    run_test(run())


# --- expensive items -----------------------------------------------------------------------------


def test_most_expensive_items_leave_one_runner_free() -> None:
    async def run() -> None:
        first_runner, second_runner = Doubler(is_automatic=False), Doubler(is_automatic=False)
        batcher = make_batcher(first_runner, second_runner)
        cheap_lane, costly_lane = make_lane(batch_max=1), make_lane(batch_max=1, level=LEVEL_COUNT - 1)
        costly_answers = [batcher.submit(item, costly_lane) for item in (100, 200, 300)]
        await run_ready_callbacks()
        assert sorted(map(len, (first_runner.batches, second_runner.batches))) == [0, 1]
        busy_runner, free_runner = (
            (first_runner, second_runner) if first_runner.batches else (second_runner, first_runner)
        )
        cheap_answers = [batcher.submit(item, cheap_lane) for item in (1, 2, 3)]
        await run_ready_callbacks()
        assert free_runner.batches == [[1], [2]]  # and nothing waits behind the expensive one
        assert busy_runner.separate == [True]
        busy_runner.finish_batch()
        await run_ready_callbacks()
        assert busy_runner.batches == [[100], [200]]
        for runner in (free_runner, free_runner, busy_runner, free_runner, busy_runner):
            runner.finish_batch()
            await run_ready_callbacks()
        assert await asyncio.gather(*cheap_answers, *costly_answers) == [2, 4, 6, 200, 400, 600]

    run_test(run())


def test_costly_items_use_half_of_the_runners_beside_cheap_ones() -> None:
    """Costly items use all runners while no cheaper items wait."""

    async def run() -> None:
        cheap_lane, costly_lane = make_lane(batch_max=1), make_lane(batch_max=1, level=1)
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        batcher = make_batcher(*runners)
        futures = [batcher.submit(item, costly_lane) for item in range(20, 28)]
        await run_ready_callbacks()
        assert [len(runner.batches) for runner in runners] == [2, 2, 2, 2]

        other_runners = [Doubler(is_automatic=False) for _ in range(4)]
        batcher = make_batcher(*other_runners)
        futures += [batcher.submit(1, cheap_lane)]
        futures += [batcher.submit(item, costly_lane) for item in range(30, 38)]
        await run_ready_callbacks()
        costly_runners = [
            runner for runner in other_runners if any(items[0] >= 30 for items in runner.batches)
        ]
        assert len(costly_runners) == 2
        for runner in [*runners, *other_runners] * 9:
            if runner.is_busy:
                runner.finish_batch()
                await run_ready_callbacks()
        answers: list[Any] = [*await asyncio.gather(*futures)]
        assert answers == [*range(40, 56, 2), 2, *range(60, 76, 2)]

    run_test(run())


def test_single_runner_divides_its_time_by_cost_level() -> None:
    """A second of a runner's time costs the most expensive level eight times as much as the cheapest."""

    async def run() -> None:
        runner = Doubler(is_automatic=False)
        batcher = make_batcher(runner)
        cheap_lane, costly_lane = make_lane(batch_max=1), make_lane(batch_max=1, level=LEVEL_COUNT - 1)
        cheap_lane.seconds_per_item = costly_lane.seconds_per_item = 1.0
        futures = [batcher.submit(item, cheap_lane) for item in range(16)]
        futures += [batcher.submit(100 + item, costly_lane) for item in range(3)]
        while not all(future.done() for future in futures):
            await run_ready_callbacks()
            cheap_lane.seconds_per_item = costly_lane.seconds_per_item = 1.0
            runner.finish_batch()
        costly_flags = [items[0] >= 100 for items in runner.batches]
        assert costly_flags.index(True) < 8
        assert 6 <= costly_flags[costly_flags.index(True) + 1 :].index(True) <= 10

    run_test(run())


def test_memory_is_reserved_until_a_batch_is_done() -> None:
    async def run() -> None:
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        batcher = make_batcher(*runners, memory=100)
        large_lane, small_lane = make_lane(batch_max=1), make_lane(batch_max=1)
        futures = [batcher.submit(item, large_lane, memory=60) for item in (1, 2)]
        futures += [batcher.submit(10, large_lane, memory=1000)]  # it is limited to all of the memory
        futures += [batcher.submit(item, small_lane) for item in (5, 6)]
        await run_ready_callbacks()
        started_batches = [items for runner in runners for items in runner.batches]
        assert sorted(started_batches) == [[1], [5], [6]]
        assert sorted(memory for runner in runners for memory in runner.memory) == [0, 0, 60]
        while busy_runners := [runner for runner in runners if runner.is_busy]:
            assert sum(runner.reserved for runner in busy_runners) <= 100
            busy_runners[0].finish_batch()
            await run_ready_callbacks()
        assert await asyncio.gather(*futures) == [2, 4, 20, 10, 12]
        assert max(memory for runner in runners for memory in runner.memory) == 100

    run_test(run())


def test_large_memory_request_is_not_overtaken() -> None:
    async def run() -> None:
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        batcher = make_batcher(*runners, memory=100)
        lane, other_lane = make_lane(batch_max=1), make_lane(batch_max=1)
        first_answer = batcher.submit(1, lane, memory=50)
        await run_ready_callbacks()
        lane.virtual_time = other_lane.virtual_time = 0.0
        large_answer = batcher.submit(2, lane, memory=100)
        await run_ready_callbacks()
        small_answer = batcher.submit(3, other_lane, memory=40)
        await run_ready_callbacks()
        assert sum(len(runner.batches) for runner in runners) == 1
        for expected in ([2], [3]):
            next(runner for runner in runners if runner.is_busy).finish_batch()
            await run_ready_callbacks()
            assert expected in [runner.batches[-1] for runner in runners if runner.batches]
        next(runner for runner in runners if runner.is_busy).finish_batch()
        assert list(await asyncio.gather(first_answer, large_answer, small_answer)) == [2, 4, 6]

    run_test(run())


def test_memory_of_a_dead_runner_is_released() -> None:
    async def run() -> None:
        dying_runner, new_runner = Doubler(is_automatic=False), Doubler()
        batcher = make_batcher(dying_runner, memory=100)
        lane = make_lane(batch_max=1)
        future = batcher.submit(1, lane, memory=100)
        await run_ready_callbacks()
        assert dying_runner.memory == [100]
        batcher.remove_runner(dying_runner)
        dying_runner.die()
        batcher.add_runner(new_runner)
        assert await future == 2
        assert new_runner.memory == [100]

    run_test(run())


def test_item_of_infinite_weight_runs_alone_and_counts_for_its_size() -> None:
    async def work() -> None:
        lane: Lane[int, int] = Lane(0, 4, weight_max=10, weigh=lambda item: INFINITY if item > 100 else 1)
        batcher = Batcher(Metrics(CollectorRegistry()))
        runner = Doubler(is_automatic=False)
        futures = [
            batcher.submit(item, lane, size=50 if item > 100 else 1) for item in (1, 2, 101, 3, 102, 103, 4)
        ]
        batcher.add_runner(runner)
        while not all(future.done() for future in futures):
            await asyncio.sleep(0)
            if runner.is_busy:
                runner.finish_batch()
        assert [batch for batch in runner.batches if max(batch) > 100] == [[101], [102], [103]]
        assert [future.result() for future in futures] == [2, 4, 202, 6, 204, 206, 8]

    asyncio.run(work())


def test_time_of_a_large_item_is_averaged_over_its_size() -> None:
    async def work() -> None:
        lane: Lane[int, int] = Lane(0, 4, weight_max=10, weigh=lambda item: INFINITY)
        batcher = Batcher(Metrics(CollectorRegistry()))
        runner = Doubler(is_automatic=False)
        batcher.add_runner(runner)
        started_at = time.monotonic()
        future = batcher.submit(1, lane, size=64)
        while not future.done():
            await asyncio.sleep(0)
            if runner.is_busy:
                runner.finish_batch()
        seconds = time.monotonic() - started_at
        assert 0 < 64 * lane.seconds_per_item <= seconds
        assert 0 < batcher.drain_seconds(64) <= seconds

    asyncio.run(work())


def test_large_item_that_failed_counts_as_one_in_the_averages() -> None:
    """Boxes that are not in their image fail before the model runs."""

    async def work() -> None:
        lane: Lane[int, int] = Lane(0, 4, weight_max=10, weigh=lambda item: INFINITY)
        batcher = Batcher(Metrics(CollectorRegistry()))
        runner = Doubler(is_automatic=False)
        batcher.add_runner(runner)
        future = batcher.submit(7, lane, size=64)
        while not runner.is_busy:
            await asyncio.sleep(0)
        started_at = time.monotonic()
        await asyncio.sleep(0.01)
        seconds = time.monotonic() - started_at
        runner.finish_batch()
        with pytest.raises(ValueError, match="odd"):
            await future
        assert lane.seconds_per_item >= seconds
        assert batcher.drain_seconds(1) >= seconds

    asyncio.run(work())


def test_waiting_items_count_by_their_sizes() -> None:
    async def work() -> None:
        lane: Lane[int, int] = Lane(0, 4, level=2, weight_max=10, weigh=lambda item: INFINITY)
        metrics = Metrics(CollectorRegistry())
        batcher = Batcher(metrics)
        jobs = [batcher.enqueue(1, lane, lambda *_: None, deadline=INFINITY, size=size) for size in (64, 3)]
        assert batcher.count_waiting(2) == 67
        metrics.fold()
        assert metrics.registry.get_sample_value("fovea_queue_images") == 67
        batcher.cancel(jobs[0])
        assert batcher.count_waiting(2) == 3

    asyncio.run(work())
