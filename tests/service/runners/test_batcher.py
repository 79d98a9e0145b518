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
    """Run a test with a time limit: a caller who is never answered must not hang the tests."""

    async def run_limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(run_limited())


async def run_ready_callbacks() -> None:
    """Let the event loop run all callbacks that are ready."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_each_caller_gets_its_own_result() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler()
        batches = make_batcher(runner, Doubler())
        answers = await asyncio.gather(*(batches.submit(i, ours) for i in range(14, 114)))
        assert answers == [2 * i for i in range(14, 114)]
        assert max(map(len, runner.batches)) == 4

    run_test(run())


def test_what_waits_goes_together_and_nobody_waits_for_company() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        batches.submit(1, ours)
        await run_ready_callbacks()
        for i in range(2, 9):
            batches.submit(i, ours)
        for _ in range(3):
            await run_ready_callbacks()
            runner.finish_batch()
        assert runner.batches == [[1], [2, 3, 4, 5], [6, 7, 8]]

    run_test(run())


def test_what_comes_at_once_is_shared_among_the_free() -> None:
    async def run() -> None:
        ours, one, other = make_lane(is_shared=True), Doubler(is_automatic=False), Doubler(is_automatic=False)
        batches = make_batcher(one, other)
        for i in range(8):
            batches.submit(i, ours)
        await run_ready_callbacks()
        assert (one.batches, other.batches) == ([[0, 1], [4, 5]], [[2, 3], [6], [7]])

    run_test(run())


def test_only_what_is_alone_gets_the_wide_runner_to_itself() -> None:
    async def run() -> None:
        ours = make_lane()
        narrow, wide = Doubler(is_automatic=False), Doubler(is_multi_threaded=True, is_automatic=False)
        batches = make_batcher(narrow, wide)
        batches.submit(1, ours)
        await run_ready_callbacks()
        batches.submit(2, ours)
        await run_ready_callbacks()
        assert (wide.exclusive, narrow.exclusive) == ([True], [False])
        wide.finish_batch()
        await run_ready_callbacks()
        batches.submit(3, ours)
        await run_ready_callbacks()
        assert wide.exclusive == [True, False]

    run_test(run())


def test_heavy_items_do_not_share_a_batch() -> None:
    async def run() -> None:
        ours, runner = make_lane(weigh=float, weight_max=10), Doubler()
        batches = make_batcher(runner)
        await asyncio.gather(*(batches.submit(i, ours) for i in (1, 2, 3, 9, 50, 1)))
        assert runner.batches == [[1, 2, 3], [9], [50], [1]]

    run_test(run())


def test_a_caller_who_leaves_costs_nothing_and_harms_no_neighbour() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        first = batches.submit(1, ours)
        await run_ready_callbacks()
        leaves, stays = batches.submit(2, ours), batches.submit(3, ours)
        first.cancel()
        leaves.cancel()
        runner.finish_batch()
        await run_ready_callbacks()
        runner.finish_batch()
        assert await stays == 6
        assert runner.batches == [[1], [3]]

    run_test(run())


def test_who_leaves_makes_room_at_once_while_no_runner_is_free() -> None:
    async def run() -> None:
        ours, runner = make_lane(1), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        first = batches.submit(1, ours)
        await run_ready_callbacks()
        batches.submit(5, ours)
        await run_ready_callbacks()
        stays = batches.submit(2, ours)
        for i in range(100):
            batches.submit(i, ours).cancel()
        first.cancel()
        await run_ready_callbacks()
        assert [job.item for job in ours.jobs] == [2]
        for _ in range(3):
            runner.finish_batch()
            await run_ready_callbacks()
        assert await stays == 4

    run_test(run())


def test_a_runner_has_room_for_one_batch_behind_another() -> None:
    async def run() -> None:
        ours, runner = make_lane(2), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        for i in range(8):
            batches.submit(i, ours)
            await run_ready_callbacks()
        assert runner.batches == [[0], [1], [2], [3]]
        runner.finish_batch()
        assert runner.batches[4:] == [[4, 5]]

    run_test(run())


def test_heavy_items_take_as_much_room_as_a_batch() -> None:
    async def run() -> None:
        ours = make_lane(4, weigh=float, weight_max=10.0)
        one, other = Doubler(is_automatic=False), Doubler(is_automatic=False)
        batches = make_batcher(one, other)
        for weight in (100, 101, 102, 103, 104, 105):
            batches.submit(weight, ours)
        await run_ready_callbacks()
        assert (one.batches, other.batches) == ([[100], [102]], [[101], [103]])

    run_test(run())


def test_what_was_lost_stays_apart() -> None:
    async def run() -> None:
        ours, dies, other = make_lane(), Doubler(is_automatic=False), Doubler(is_automatic=False)
        batches = make_batcher(dies)
        for i in range(2):
            batches.submit(i, ours)
        await run_ready_callbacks()
        batches.remove_runner(dies)
        dies.die()
        batches.add_runner(other)
        await run_ready_callbacks()
        assert (dies.separate, other.separate) == ([False], [True, True])
        assert other.batches == [[0], [1]]

    run_test(run())


def test_no_item_gets_into_a_log() -> None:
    async def run() -> None:
        ours = make_lane()
        batches = make_batcher()
        answer = batches.submit(123_456_789, ours)
        assert "123456789" not in repr(answer)
        assert "123456789" not in repr(ours)

    run_test(run())


def test_a_runner_is_told_of_who_leaves_when_it_has_the_batch() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        batches.submit(1, ours)
        await run_ready_callbacks()
        leaves = batches.submit(2, ours)
        await run_ready_callbacks()
        leaves.cancel()
        await run_ready_callbacks()
        assert runner.dropped == [2]

    run_test(run())


def test_what_is_past_its_deadline_is_not_worked_on() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        batches.submit(1, ours)
        await run_ready_callbacks()
        batches.submit(2, ours, deadline=time.monotonic())
        batches.submit(3, ours, deadline=time.monotonic() + 100)
        runner.finish_batch()
        await run_ready_callbacks()
        assert runner.batches == [[1], [3]]

    run_test(run())


def test_company_is_waited_for_where_it_is_told_to() -> None:
    async def run() -> None:
        ours, runner = make_lane(max_wait=0.05), Doubler()
        batches = make_batcher(runner)
        first = batches.submit(1, ours)
        await asyncio.sleep(0.01)
        second = batches.submit(2, ours)
        assert (await first, await second) == (2, 4)
        full = [batches.submit(i, ours) for i in range(3, 7)]
        await run_ready_callbacks()
        assert all(answer.done() for answer in full), "a full batch waits for nobody"
        assert runner.batches == [[1, 2], [3, 4, 5, 6]]

    run_test(run())


def test_one_that_fails_alone_harms_no_neighbour() -> None:
    async def run() -> None:
        ours = make_lane()
        batches = make_batcher(Doubler())
        odd, even = batches.submit(7, ours), batches.submit(8, ours)
        assert await even == 16
        with pytest.raises(ValueError, match="odd"):
            await odd

    run_test(run())


def test_a_batch_that_raises_reaches_its_callers_alone() -> None:
    async def run() -> None:
        ours = make_lane()
        batches = make_batcher(Doubler())
        with pytest.raises(ArithmeticError, match="thirteen"):
            await batches.submit(13, ours)
        assert await batches.submit(4, ours) == 8

    run_test(run())


def test_what_a_runner_died_at_runs_once_more_each_by_itself() -> None:
    async def run() -> None:
        ours, runner, next_one = make_lane(), Doubler(is_automatic=False), Doubler()
        batches = make_batcher(runner)
        answers = [batches.submit(i, ours) for i in range(4)]
        await run_ready_callbacks()
        batches.remove_runner(runner)
        runner.die()
        await run_ready_callbacks()
        batches.add_runner(next_one)
        assert await asyncio.gather(*answers) == [0, 2, 4, 6]
        assert next_one.batches == [[0], [1], [2], [3]]

    run_test(run())


def test_what_kills_two_runners_is_given_up() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        killer, stays = batches.submit(1, ours), batches.submit(2, ours)
        for _ in range(2):
            await run_ready_callbacks()
            runner.die()
        await run_ready_callbacks()
        with pytest.raises(RunnerLost):
            await killer
        runner.finish_batch()
        assert await stays == 4

    run_test(run())


def test_lanes_do_not_mix_and_the_one_that_waits_longest_is_next() -> None:
    async def run() -> None:
        cats, dogs, runner = make_lane(), make_lane(), Doubler(is_automatic=False)
        batches = make_batcher(runner)
        batches.submit(1, dogs)
        await run_ready_callbacks()
        for i in (2, 3, 4):
            batches.submit(i, dogs)
            batches.submit(10 * i, cats)
        for _ in range(3):
            runner.finish_batch()
            await run_ready_callbacks()
        assert runner.batches == [[1], [2, 3, 4], [20, 30, 40]]

    run_test(run())


def test_the_drain_time_grows_with_what_waits() -> None:
    async def run() -> None:
        ours = make_lane()
        batches = make_batcher(Doubler())
        assert batches.drain_seconds(100) == 0
        await batches.submit(1, ours)
        assert batches.drain_seconds(200) == pytest.approx(2 * batches.drain_seconds(100))
        assert batches.drain_seconds(100) > 0

    run_test(run())


def test_the_queue_is_counted() -> None:
    registry = CollectorRegistry()

    async def run() -> None:
        ours = make_lane()
        batches = Batcher(Metrics(registry))
        answers = [batches.submit(i, ours) for i in range(5)]
        await run_ready_callbacks()
        assert registry.get_sample_value("fovea_queue_images") == 5
        batches.add_runner(Doubler())
        await asyncio.gather(*answers)
        await run_ready_callbacks()

    run_test(run())
    assert registry.get_sample_value("fovea_queue_images") == 0
    assert registry.get_sample_value("fovea_stage_seconds_count", {"stage": "queue"}) == 5


def test_a_caller_that_cannot_be_told_costs_nobody_else_an_answer() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler()
        batches = make_batcher(runner)
        told: list[object] = []

        def record_outcome(outcome: object, _job: Job) -> None:
            told.append(outcome)

        def raise_error(_outcome: object, _job: Job) -> None:
            raise OSError("the connection has been reset")

        for answered in (record_outcome, raise_error, record_outcome):
            batches.enqueue(len(told) + 1, ours, answered, deadline=INFINITY)
        assert await batches.submit(5, ours) == 10
        assert told == [2, 2]
        assert await batches.submit(6, ours) == 12

    run_test(run())


def test_what_is_done_leaves_nothing_for_the_garbage_collector() -> None:
    async def run() -> None:
        ours, runner = make_lane(), Doubler()
        batches = make_batcher(runner)
        gc.collect()
        gc.disable()
        try:
            await asyncio.gather(*(batches.submit(i, ours) for i in (1, 2, 7)), return_exceptions=True)
            batches.submit(8, ours).cancel()
            await run_ready_callbacks()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [one for one in gc.garbage if isinstance(one, Job | asyncio.Future)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run_test(run())


# --- exceptions in callbacks, runners and metrics ------------------------------------------------


def test_a_caller_whose_outcome_cannot_be_read_is_told_so_and_its_neighbours_are_answered() -> None:
    def read(outcome: Any, job: Job) -> Any:
        if outcome == 4:
            raise ZeroDivisionError("of a metric")
        return outcome

    async def test() -> None:
        only = make_lane()
        made = make_batcher(Doubler())
        futures = [made.submit(item, only, convert=read) for item in (1, 2, 3)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert (outcomes[0], outcomes[2]) == (2, 6)
        assert isinstance(outcomes[1], ZeroDivisionError)

    run_test(test())


def test_a_caller_that_cannot_take_its_answer_gets_the_error() -> None:
    async def test() -> None:
        only = make_lane()
        made = make_batcher(Doubler())
        heard: list[Any] = []
        over = asyncio.Event()

        def on_outcome(outcome: Any, job: Job) -> None:
            heard.append(outcome)
            if not isinstance(outcome, Exception):
                raise ZeroDivisionError("of an answer")
            over.set()

        made.enqueue(1, only, on_outcome, deadline=INFINITY)
        await over.wait()
        assert heard[0] == 2
        assert isinstance(heard[1], ZeroDivisionError)

    run_test(test())


def test_a_batch_that_cannot_be_sent_is_answered_and_the_next_one_is_sent() -> None:
    class Unsendable(Doubler):
        def start_batch(
            self, lane: Lane[Any, Any], items: Sequence[Any], *rest: Any, **options: Any
        ) -> DropItem:
            if 2 in items:
                raise TypeError("no JSON")
            return super().start_batch(lane, items, *rest, **options)

    async def test() -> None:
        only = make_lane(batch_max=1)
        made = make_batcher(Unsendable())
        futures = [made.submit(item, only) for item in (1, 2, 3)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert (outcomes[0], outcomes[2]) == (2, 6)
        assert isinstance(outcomes[1], TypeError)

    run_test(test())


def test_metrics_that_raise_cost_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    async def test() -> None:
        only = make_lane()
        metrics = Metrics(CollectorRegistry())
        made = Batcher(metrics)
        made.add_runner(Doubler())
        monkeypatch.setattr(metrics.queue_images, "set", fail)
        monkeypatch.setattr(metrics.seconds_by_stage["queue"], "observe", fail)
        assert await made.submit(1, only) == 2
        assert await made.submit(2, only) == 4

    run_test(test())


# --- expensive items -----------------------------------------------------------------------------


def test_the_most_expensive_items_never_have_all_runners() -> None:
    async def test() -> None:
        first, second = Doubler(is_automatic=False), Doubler(is_automatic=False)
        made = make_batcher(first, second)
        cheap, costly = make_lane(batch_max=1), make_lane(batch_max=1, level=LEVEL_COUNT - 1)
        slow = [made.submit(item, costly) for item in (100, 200, 300)]
        await run_ready_callbacks()
        assert sorted(map(len, (first.batches, second.batches))) == [0, 1]
        busy, free = (first, second) if first.batches else (second, first)
        quick = [made.submit(item, cheap) for item in (1, 2, 3)]
        await run_ready_callbacks()
        assert free.batches == [[1], [2]]  # and nothing waits behind the expensive one
        assert busy.separate == [True]
        busy.finish_batch()
        await run_ready_callbacks()
        assert busy.batches == [[100], [200]]
        for runner in (free, free, busy, free, busy):
            runner.finish_batch()
            await run_ready_callbacks()
        assert await asyncio.gather(*quick, *slow) == [2, 4, 6, 200, 400, 600]

    run_test(test())


def test_dear_items_have_half_of_the_runners_while_cheaper_ones_come_and_all_when_none_do() -> None:
    async def test() -> None:
        cheap, dear = make_lane(batch_max=1), make_lane(batch_max=1, level=1)
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        made = make_batcher(*runners)
        futures = [made.submit(item, dear) for item in range(20, 28)]
        await run_ready_callbacks()
        assert [len(runner.batches) for runner in runners] == [2, 2, 2, 2]

        others = [Doubler(is_automatic=False) for _ in range(4)]
        made = make_batcher(*others)
        futures += [made.submit(1, cheap)]
        futures += [made.submit(item, dear) for item in range(30, 38)]
        await run_ready_callbacks()
        having = [one for one in others if any(items[0] >= 30 for items in one.batches)]
        assert len(having) == 2
        for runner in [*runners, *others] * 9:
            if runner.is_busy:
                runner.finish_batch()
                await run_ready_callbacks()
        answers: list[Any] = [*await asyncio.gather(*futures)]
        assert answers == [*range(40, 56, 2), 2, *range(60, 76, 2)]

    run_test(test())


def test_one_runner_takes_all_and_shares_its_time() -> None:
    """A second of a runner's time costs the most expensive level eight times as much as the cheapest."""

    async def test() -> None:
        only = Doubler(is_automatic=False)
        made = make_batcher(only)
        cheap, costly = make_lane(batch_max=1), make_lane(batch_max=1, level=LEVEL_COUNT - 1)
        cheap.seconds_per_item = costly.seconds_per_item = 1.0
        futures = [made.submit(item, cheap) for item in range(16)]
        futures += [made.submit(100 + item, costly) for item in range(3)]
        while not all(future.done() for future in futures):
            await run_ready_callbacks()
            cheap.seconds_per_item = costly.seconds_per_item = 1.0
            only.finish_batch()
        order = [items[0] >= 100 for items in only.batches]
        assert order.index(True) < 8
        assert 6 <= order[order.index(True) + 1 :].index(True) <= 10

    run_test(test())


def test_memory_is_reserved_before_a_runner_begins_and_freed_when_it_is_done() -> None:
    async def test() -> None:
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        made = make_batcher(*runners, memory=100)
        large, small = make_lane(batch_max=1), make_lane(batch_max=1)
        futures = [made.submit(item, large, memory=60) for item in (1, 2)]
        futures += [made.submit(10, large, memory=1000)]  # it gets all that there is
        futures += [made.submit(item, small) for item in (5, 6)]
        await run_ready_callbacks()
        begun = [items for runner in runners for items in runner.batches]
        assert sorted(begun) == [[1], [5], [6]]
        assert sorted(memory for runner in runners for memory in runner.memory) == [0, 0, 60]
        while busy := [runner for runner in runners if runner.is_busy]:
            assert sum(runner.reserved for runner in busy) <= 100
            busy[0].finish_batch()
            await run_ready_callbacks()
        assert await asyncio.gather(*futures) == [2, 4, 20, 10, 12]
        assert max(memory for runner in runners for memory in runner.memory) == 100

    run_test(test())


def test_who_needs_much_memory_is_not_overtaken_by_who_needs_less() -> None:
    async def test() -> None:
        runners = [Doubler(is_automatic=False) for _ in range(4)]
        made = make_batcher(*runners, memory=100)
        ours, theirs = make_lane(batch_max=1), make_lane(batch_max=1)
        first = made.submit(1, ours, memory=50)
        await run_ready_callbacks()
        ours.virtual_time = theirs.virtual_time = 0.0
        large = made.submit(2, ours, memory=100)
        await run_ready_callbacks()
        less = made.submit(3, theirs, memory=40)
        await run_ready_callbacks()
        assert sum(len(runner.batches) for runner in runners) == 1
        for expected in ([2], [3]):
            next(runner for runner in runners if runner.is_busy).finish_batch()
            await run_ready_callbacks()
            assert expected in [runner.batches[-1] for runner in runners if runner.batches]
        next(runner for runner in runners if runner.is_busy).finish_batch()
        assert list(await asyncio.gather(first, large, less)) == [2, 4, 6]

    run_test(test())


def test_memory_of_a_dead_runner_is_free_again() -> None:
    async def test() -> None:
        dying, other = Doubler(is_automatic=False), Doubler()
        made = make_batcher(dying, memory=100)
        ours = make_lane(batch_max=1)
        future = made.submit(1, ours, memory=100)
        await run_ready_callbacks()
        assert dying.memory == [100]
        made.remove_runner(dying)
        dying.die()
        made.add_runner(other)
        assert await future == 2
        assert other.memory == [100]

    run_test(test())
