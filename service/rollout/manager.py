"""The manager of the loaded models: it brings the catalog in line with the desired state.

A version is tried, loaded in the runners beside the others, and switched to at once. Swaps, loads on demand,
unloads and the return of lost models all take the same steps, and `_settle` decides what follows each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Interrupted, ModelError, NotReady, to_one_line
from fovea.service.rollout.trial import (
    ShadowTestResult,
    ShadowTests,
    check_result,
    compute_change_timeout,
    is_lasting,
)
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.memory_plan import estimate_process_bytes
from fovea.service.serving.catalog import CatalogEntry, VersionState
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.live_model import LiveModel

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
"""Time in seconds before a model that could not be loaded on demand is tried again."""


_RELOAD_DELAYS: Final = (1.0, 30.0)
"""Time in seconds before a lost model is loaded again: the first delay, which doubles each time, and the
maximum."""


class ModelManager:
    """Manager of the loaded models in one process. Every method must be called on the event loop."""

    def __init__(self, classifier: Classifier) -> None:
        settings = classifier.settings
        self._settings = settings
        self._classifier = classifier
        self._catalog = classifier.catalog
        self._metrics = classifier.metrics
        self._shadow_tests = ShadowTests(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        self._test_lock = asyncio.Lock()
        self._load_lock = asyncio.Lock()
        self._prepared_versions: dict[str | None, Sequence[ModelVersion]] = {}
        """Versions that a change will serve, by model."""
        self._tasks: set[asyncio.Task[LiveModel] | asyncio.Task[None]] = set()
        self.on_lost: Callable[[str | None, bool], None] = lambda name, is_lost: None
        """Callback with a model's name: the model has been lost with all its runners (True), or is back or
        given up (False)."""
        self.on_refused: Callable[[ModelVersion, str, bool], None] = lambda version, reason, lasting: None
        """Callback for an unloaded version that fails its trial: the version, the reason, and whether the
        refusal is lasting."""

    @property
    def change_timeout(self) -> float:
        """Return the time limit in seconds of a change: `compute_change_timeout`."""
        return compute_change_timeout(self._settings.trial_seconds)

    def close(self) -> None:
        """Cancel the running trial and the pending loads."""
        self._shadow_tests.close()
        for task in self._tasks:
            task.cancel()

    # --- changes of the desired state ---

    async def prepare(
        self, name: str | None, versions: Sequence[ModelVersion], *, force: bool = False
    ) -> None:
        """Load the versions in `versions`, which `serve` will make the served versions of one model.

        Every version is tried first, also if it is not loaded. The latest version is loaded if any version
        of the model is loaded now, or if there is room. Other versions are loaded if there is room. With
        `force`, the versions are not compared with the served version.

        Raises `ModelError` when a version cannot be served. In that case nothing has changed.
        """
        self.abort(name)
        change = self._prepared_versions[name] = list(versions)
        try:
            for one in reversed(change):
                entry = self._catalog.get_entry(one)
                if entry.state is VersionState.READY:
                    continue
                with self._work_on(entry, "a change needs it"):
                    await self._test(entry, compares=not force)
                    replaces_loaded = one is change[-1] and self._catalog.list_live_versions(name)
                    if replaces_loaded or self._has_room():
                        await self._load(entry)
                if self._prepared_versions.get(name) is not change:
                    raise Interrupted("the change was given up meanwhile")
        except BaseException:
            if self._prepared_versions.get(name) is change:
                self.abort(name)
            raise

    def abort(self, name: str | None) -> None:
        """Drop a prepared change, including one that is still being prepared."""
        if versions := self._prepared_versions.pop(name, None):
            self._settle(self._catalog.get_entry(one) for one in versions)

    def serve(self, state: ServingState) -> None:
        """Switch to `state`, as `RolloutTarget` describes.

        Replaced versions are unloaded when their last request is answered.
        """
        self._catalog.set_state(state)
        for name, versions in list(self._prepared_versions.items()):
            if tuple(versions) == state.versions_by_model.get(name, ()):
                del self._prepared_versions[name]
        self._settle(self._catalog.entries)

    def _is_prepared(self, version: ModelVersion) -> bool:
        return version in self._prepared_versions.get(version.name, ())

    @contextlib.contextmanager
    def _work_on(self, entry: CatalogEntry, reason: str) -> Iterator[None]:
        """Keep a version `LOADING` while a task tries or loads it inside the block, and settle it then."""
        entry.task_count += 1
        if entry.state is not VersionState.LOADING:
            self._catalog.move(entry, VersionState.LOADING, reason)
        outcome = "it could not be loaded; the log says why"
        try:
            yield
            outcome = ""
        finally:
            entry.task_count -= 1
            self._settle([entry], outcome)

    def _settle(self, entries: Iterable[CatalogEntry], outcome: str = "") -> None:
        """Move versions to the states that follow from the desired state and from what the runners have.

        This comes after each change of the desired state and each end of a task. `outcome` is the reason for
        the state of a version that no runner has.
        """
        new_models = []
        # New versions are added before old ones drain: at no moment is a model without a version.
        for entry in sorted(entries, key=lambda one: one.state is VersionState.READY):
            is_desired = self._catalog.is_desired(entry.model_version)
            if entry.state in (VersionState.DRAINING, VersionState.GONE):
                continue
            if entry.model and is_desired:
                if entry.state is VersionState.LOADING:
                    self._catalog.move(entry, VersionState.READY)
                    new_models.append(entry.model)
            elif self._is_prepared(entry.model_version):
                continue
            elif entry.model:
                self._drain(entry, entry.model, "it is not served any more")
            elif entry.task_count:
                continue
            elif not is_desired:
                self._catalog.move(entry, VersionState.GONE, outcome)
            elif entry.state is VersionState.LOADING:
                self._catalog.move(entry, VersionState.FOUND, outcome)
        if new_models:
            self._make_room(0, keep=new_models)

    # --- room for models ---

    def _has_room(self) -> bool:
        """Return whether another model may be loaded. Prepared models count too."""
        max_models = self._settings.models_loaded
        loaded = [
            one for one in self._catalog.entries if one.model and one.state is not VersionState.DRAINING
        ]
        return not max_models or len(loaded) < max_models

    def _make_room(self, count: int, *, keep: Sequence[LiveModel] = ()) -> None:
        """Drain models until there is room for `count` more.

        Idle models drain first, the least recently used before others. Models in `keep` drain last: older
        versions before the latest.
        """
        max_models = self._settings.models_loaded
        while max_models and (models := self._catalog.models) and len(models) + count > max_models:

            def order(model: LiveModel) -> tuple[bool, int, bool, float]:
                rank = 0
                if model in keep:
                    rank = self._catalog.list_live_versions(model.model_version.name).index(model)
                return model in keep, rank, model.active_requests > 0, model.last_used

            model = min(models, key=order)
            entry = self._catalog.get_entry(model.model_version)
            self._drain(entry, model, "another model needs its place")

    def _drain(self, entry: CatalogEntry, model: LiveModel, reason: str) -> None:
        """Send a version no more requests, and unload its model when the last request is answered."""
        self._catalog.move(entry, VersionState.DRAINING, reason)

        def unload() -> None:
            if entry.state is VersionState.DRAINING and entry.model is model:
                is_desired = self._catalog.is_desired(entry.model_version)
                self._catalog.move(entry, VersionState.FOUND if is_desired else VersionState.GONE)
                self._classifier.unload(model)

        model.call_when_idle(unload)

    # --- models that are loaded on demand ---

    async def load_on_demand(self, name: str | None, version: str | None) -> LiveModel:
        """Return the requested model, and load it first if it is not loaded.

        The least recently used model makes room.

        The caller holds the model as after `LiveModel.acquire`. Raises `NotReady` when the model cannot be
        loaded, and `ModelNotFound` when it has been removed meanwhile.
        """
        task = asyncio.get_running_loop().create_task(self._load_on_demand(name, version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            # A load goes on when one caller leaves: other callers may wait for the same model.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # The task still takes the model for this caller: release the model when the task is done.
            task.add_done_callback(_release_model)
            raise

    async def _load_on_demand(self, name: str | None, version: str | None) -> LiveModel:
        """Try and load the requested model, and take it.

        The model may have changed after each step: look it up again.
        """
        while True:
            model = self._catalog.get(name, version)
            if isinstance(model, LiveModel):
                model.acquire()
                return model
            entry = self._catalog.get_entry(model)
            if not entry.model and not entry.task_count:
                self._check_retry(entry)
            with self._work_on(entry, "a request needs it"):
                async with entry.lock:
                    await self._try_on_demand(entry)

    async def _try_on_demand(self, entry: CatalogEntry) -> None:
        """Try and load a version, unless the runners have it or that has just failed. Raises `NotReady`."""
        if entry.model:
            return
        self._check_retry(entry)
        try:
            await self._test(entry, is_refusal=True)
            await self._load(entry, makes_room=True)
        except ModelError as error:
            name, _ = self._catalog.get_identity(entry)
            log.error(f"model {name} cannot be loaded: {to_one_line(error)}")
            entry.retry_at = time.monotonic() + _RETRY_SECONDS
            self._check_retry(entry)

    def _check_retry(self, entry: CatalogEntry) -> None:
        """Raise `NotReady` if a version could not be loaded a moment ago."""
        if time.monotonic() < entry.retry_at:
            name, _ = self._catalog.get_identity(entry)
            message = f"model {name!r} could not be loaded; the log says why"
            raise NotReady(message, retry_after=_RETRY_SECONDS)

    # --- models that were lost ---

    def handle_lost_model(self, model_id: int) -> None:
        """Load a lost model again as soon as its file allows. See `Classifier.on_model_lost`."""
        entry = self._catalog.find_entry(model_id)
        if entry is None or entry.model is None:
            return
        model, is_ready = entry.model, entry.state is VersionState.READY
        if entry.state is VersionState.LOADING:
            entry.model = None  # a change may go on, and leaves it to the next request
        elif self._catalog.is_desired(entry.model_version):
            self._catalog.move(entry, VersionState.FOUND, "it was lost with all runners")
        else:
            self._catalog.move(entry, VersionState.GONE, "it was lost with all runners")
        if is_ready:
            entry.is_lost = True
            self.on_lost(entry.model_version.name, True)
            task = asyncio.get_running_loop().create_task(self._reload_lost(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        model.call_when_idle(lambda: self._classifier.unload(model))

    async def _reload_lost(self, entry: CatalogEntry) -> None:
        """Load a lost model again, with growing delays, until it is loaded or its place is taken."""
        delay, longest = _RELOAD_DELAYS
        while True:
            await asyncio.sleep(delay)
            if entry.model or not self._catalog.is_desired(entry.model_version) or not self._has_room():
                break
            try:
                with self._work_on(entry, entry.reason):
                    await self._load(entry)
                break
            except ModelError as error:
                reason = to_one_line(error)
                log.error(
                    f"{entry.model_version.path} was lost with all runners, and cannot be loaded: {reason}"
                )
                delay = min(2 * delay, longest)
        entry.is_lost = False
        self.on_lost(entry.model_version.name, False)

    # --- one version ---

    async def _load(self, entry: CatalogEntry, *, makes_room: bool = False) -> None:
        """Load a version in all runners unless they have it, or it is not wanted any more.

        Raises `ModelError`.
        """
        async with self._load_lock:
            version = entry.model_version
            if entry.model or not (self._catalog.is_desired(version) or self._is_prepared(version)):
                return
            if entry.state is not VersionState.LOADING:  # it has drained while this waited for the lock
                self._catalog.move(entry, VersionState.LOADING, entry.reason)
            if makes_room:
                self._make_room(1)
            load = self._classifier.create_load(version)
            try:
                await self._write_weights(load)
                load_result = await self._classifier.runners.load_model(load)
            except BaseException:  # the runners no longer use the file
                self._classifier.close_file(load)
                raise
            entry.model = self._classifier.create_model(version, load, load_result)
            self._metrics.model_changes.labels(entry.model.name, "loaded").inc()

    async def _write_weights(self, load: LoadCommand) -> None:
        """Let a process that reads no images write the weights that the runners share, and seal them.

        No memory is reserved: the process ends before the runners take the memory that the model has in the
        memory plan.
        """
        try:
            await asyncio.to_thread(self._shadow_tests.write_weights, self._limit_threads(load))
        except ModelError as error:  # the runners load the model in the usual way
            log.warning(f"the runners do not share the weights of {load.path}: {to_one_line(error)}")
        self._classifier.seal_weights(load)

    async def _test(self, entry: CatalogEntry, *, compares: bool = False, is_refusal: bool = False) -> None:
        """Try a version unless it has passed before, and compare it with the version that is served.

        With `is_refusal`, a failure is reported to `on_refused`. Raises `ModelError`.
        """
        if entry.has_passed:
            return
        async with self._test_lock:
            if entry.has_passed:  # another task has tried it meanwhile
                return
            live = self._catalog.list_live_versions(entry.model_version.name) if compares else []
            try:
                await self._run_shadow_test(entry, live[-1] if live else None)
            except ModelError as error:
                if is_refusal and not isinstance(error, Interrupted):
                    self.on_refused(entry.model_version, to_one_line(error), is_lasting(error))
                raise

    async def _run_shadow_test(self, entry: CatalogEntry, current: LiveModel | None) -> None:
        """Run a version's trial. Raises `ModelError` when the version cannot be served."""
        version = entry.model_version
        name = current.name if current else version.name or version.path.stem
        load = self._classifier.create_load(version)
        current_load = self._limit_threads(current.load) if current else None
        give_back = None
        if current:
            current.acquire()  # keep its file open: the trial compares with it
        try:
            give_back = await self._reserve_test_memory(load, current_load)
            images = self._classifier.get_recent_images(current.name) if current else []
            result = await asyncio.to_thread(
                self._shadow_tests.run, self._limit_threads(load), current_load, images
            )
            if current and result.images:
                self._report_result(version, current, result)
                check_result(result, self._settings.swap_flips, self._settings.swap_slowdown)
        except ModelError as error:
            if not isinstance(error, Interrupted):
                self._metrics.model_changes.labels(name, "refused").inc()
            raise
        finally:
            if current:
                current.release()
            self._classifier.close_file(load)
            if give_back:
                give_back()
        entry.has_passed = True

    async def _reserve_test_memory(
        self, load: LoadCommand, current_load: LoadCommand | None
    ) -> Callable[[], None] | None:
        """Reserve memory for a trial and return the function that releases it; None if memory is not limited.

        Explanations give way to a trial. Raises `Interrupted` when memory does not become free. The version
        is then tried again at a later scan.
        """
        spare = self._classifier.spare_memory
        if spare is None:
            return None
        size = estimate_process_bytes([one for one in (load, current_load) if one]) + spare.decode_bytes
        give_back = await spare.claim(size)
        if give_back is None:
            raise Interrupted(
                f"its trial needs {size >> 20} MB of memory, which is not free now: the container is limited"
            )
        return give_back

    def _limit_threads(self, load: LoadCommand) -> LoadCommand:
        """Return a load message with one thread.

        A trial must not take processor time from requests, and single-threaded timings compare best.
        """
        spare = self._classifier.spare_memory
        decode_bytes = spare.decode_bytes if spare else load.plan.decode_bytes
        plan = replace(load.plan, threads=1, wide_threads=0, processes=1, decode_bytes=decode_bytes)
        return replace(load, plan=plan)

    def _report_result(self, version: ModelVersion, current: LiveModel, result: ShadowTestResult) -> None:
        """Set the metrics of a comparison and log it."""
        self._metrics.swap_flip_ratio.labels(current.name).set(result.flip_rate)
        self._metrics.swap_slowdown_ratio.labels(current.name).set(result.slowdown)
        log.info(
            f"model {current.name}: {version.path} gives {result.flips} of the last {result.images} images "
            f"another label than version {current.version}, and takes {result.slowdown:.2f} times as long"
        )


def _release_model(task: asyncio.Task[LiveModel]) -> None:
    """Release a model whose caller has left while the model was loading."""
    if not task.cancelled() and task.exception() is None:
        task.result().release()
