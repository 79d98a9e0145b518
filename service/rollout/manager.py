"""Changes to the served models: a version is tried, loaded beside the others, and switched to at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Interrupted, ModelError, NotReady, to_one_line
from fovea.service.rollout.trial import (
    ShadowTestResult,
    ShadowTests,
    check_result,
    compute_change_timeout,
    is_lasting,
)
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.runners.memory_plan import estimate_process_bytes
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.registry import LiveModel

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
"""Time in seconds before a model that could not be loaded on demand is tried again."""


_RELOAD_DELAYS: Final = (1.0, 30.0)
"""Time in seconds before a lost model is loaded again: the first delay, which doubles each time, and the
maximum."""


_MAX_TESTED: Final = 1000
"""Maximum number of remembered files that have passed their trial."""


class _LoadedVersion(NamedTuple):
    """Model that the runners have loaded but that is not serving yet."""

    version: ModelVersion
    load: LoadCommand
    load_result: LoadedModel


@dataclass(eq=False)
class _PreparedChange:
    """Future versions of one model."""

    versions: Sequence[ModelVersion]
    loaded_versions: list[_LoadedVersion] = field(default_factory=list)


class ModelManager:
    """Manager of the loaded models in one process. Every method must be called on the event loop."""

    def __init__(self, classifier: Classifier) -> None:
        settings = classifier.settings
        self._settings = settings
        self._classifier = classifier
        self._registry = classifier.registry
        self._metrics = classifier.metrics
        self._shadow_tests = ShadowTests(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        self._test_lock = asyncio.Lock()
        self._load_lock = asyncio.Lock()
        self._prepared_changes: dict[str | None, _PreparedChange] = {}
        self._tested_versions = dict.fromkeys(model.model_version for model in self._registry.models)
        self._failure_times: dict[ModelVersion, float] = {}
        """Time of the last failed load on demand, on the monotonic clock in seconds, by version."""
        self._load_tasks: set[asyncio.Task[LiveModel]] = set()
        self._reload_tasks: set[asyncio.Task[None]] = set()
        self.on_lost: Callable[[str | None, bool], None] = lambda name, is_lost: None
        """Callback with a model's name: the model has been lost with all its runners (True), or is back
        (False)."""
        self.on_refused: Callable[[ModelVersion, str, bool], None] = lambda version, reason, lasting: None
        """Callback for an unloaded version that fails its trial: the version, the reason, and whether the
        refusal is lasting."""

    @property
    def change_timeout(self) -> float:
        """Return the time limit in seconds of a change: a trial, and then a load in each runner."""
        return compute_change_timeout(self._settings.trial_seconds)

    # --- changes ---

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
        change = self._prepared_changes[name] = _PreparedChange(versions)
        try:
            for one in reversed(versions):
                if any(model.model_version == one for model in self._registry.list_live_versions(name)):
                    continue
                await self._test_change(name, one, force=force)
                replaces_loaded = one is versions[-1] and self._registry.list_live_versions(name)
                if replaces_loaded or self._has_room():
                    async with self._load_lock:
                        fresh = await self._load(one)
                    if self._prepared_changes.get(name) is not change:
                        # The change was aborted during the load: unload the version here.
                        self._classifier.unload(fresh.load)
                        break
                    change.loaded_versions.append(fresh)
            if self._prepared_changes.get(name) is not change:
                raise Interrupted("the change was given up meanwhile")
        except BaseException:
            fresh_ones, change.loaded_versions = change.loaded_versions, []
            for fresh in fresh_ones:
                self._classifier.unload(fresh.load)
            if self._prepared_changes.get(name) is change:
                del self._prepared_changes[name]
            raise

    def serve(self, state: ServingState) -> None:
        """Switch to `state`, as `RolloutTarget` describes.

        Replaced versions are unloaded when their last request is answered.
        """
        self._registry.set_state(state)
        changes = [
            self._prepared_changes.pop(name)
            for name, change in list(self._prepared_changes.items())
            if tuple(change.versions) == state.versions_by_model.get(name, ())
        ]
        # Add the new versions before the old ones are retired: at no moment is the model without a version.
        new_models = [self._add(fresh) for change in changes for fresh in change.loaded_versions]
        for model in self._registry.models:
            if model.model_version not in state.versions_by_model.get(model.model_version.name, ()):
                self._classifier.retire(model)
        self._make_room(0, keep=new_models)

    def abort(self, name: str | None) -> None:
        """Drop a prepared change, including one that is still being prepared."""
        if change := self._prepared_changes.pop(name, None):
            fresh, change.loaded_versions = change.loaded_versions, []
            for one in fresh:
                self._classifier.unload(one.load)

    # --- models that are loaded on demand ---

    async def load_on_demand(self, name: str | None, version: str | None) -> LiveModel:
        """Return the requested model, and load it first if it is not loaded.

        The least recently used model makes room.

        The caller holds the model as after `LiveModel.acquire`. Raises `NotReady` when the model cannot be
        loaded, and `ModelNotFound` when it has been removed meanwhile.
        """
        task = asyncio.get_running_loop().create_task(self._load_on_demand(name, version))
        self._load_tasks.add(task)
        task.add_done_callback(self._load_tasks.discard)
        try:
            # A load goes on when one caller leaves: other callers may wait for the same model.
            return await asyncio.shield(task)
        except ModelError as error:
            log.error(f"model {name} cannot be loaded: {to_one_line(error)}")
            message = f"model {name!r} could not be loaded; the log says why"
            raise NotReady(message, retry_after=_RETRY_SECONDS) from None
        except asyncio.CancelledError:
            # The task still takes the model for this caller: release the model when the task is done.
            task.add_done_callback(_release_model)
            raise

    async def _load_on_demand(self, name: str | None, version: str | None) -> LiveModel:
        """Try and load the requested model, and take it."""
        while True:
            model_version = self._registry.get(name, version)
            if isinstance(model_version, ModelVersion) and model_version not in self._tested_versions:
                await self._test_on_demand(model_version)
            async with self._load_lock:
                # The model may have changed while this waited for the trial and the lock: look it up again.
                model = self._registry.get(name, version)
                if model == model_version and isinstance(model, ModelVersion):
                    self._make_room(1)
                    fresh = await self._load(model)
                    if not self._is_wanted(model):  # unloaded or replaced meanwhile
                        self._classifier.unload(fresh.load)
                        continue
                    model = self._add(fresh)
                    self._make_room(0, keep=[model])
                if isinstance(model, LiveModel):
                    model.acquire()
                    return model

    def _is_wanted(self, version: ModelVersion) -> bool:
        """Return whether a version is to be served but not loaded."""
        is_served = version in self._registry.versions_by_model.get(version.name, ())
        return is_served and all(model.model_version != version for model in self._registry.models)

    # --- models that were lost ---

    def handle_lost_model(self, model_id: int, model: LiveModel | None) -> None:
        """Load a lost model again as soon as its file allows. See `Classifier.on_model_lost`."""
        for change in self._prepared_changes.values():
            for fresh in [one for one in change.loaded_versions if one.load.model_id == model_id]:
                change.loaded_versions.remove(fresh)  # it stays unloaded until a request
                self._classifier.close_file(fresh.load)
        if model is None or model.model_version not in self._registry.versions_by_model.get(
            model.model_version.name, ()
        ):
            return
        self._registry.lost_versions.add(model.model_version)
        self.on_lost(model.model_version.name, True)
        task = asyncio.get_running_loop().create_task(self._reload_lost(model.model_version))
        self._reload_tasks.add(task)
        task.add_done_callback(self._reload_tasks.discard)

    async def _reload_lost(self, version: ModelVersion) -> None:
        """Load a lost model again, with growing delays, until it is loaded or no longer wanted."""
        delay, longest = _RELOAD_DELAYS
        while True:
            await asyncio.sleep(delay)
            async with self._load_lock:
                if not self._is_wanted(version):
                    break
                try:
                    fresh = await self._load(version)
                except ModelError as error:
                    reason = to_one_line(error)
                    log.error(f"{version.path} was lost with all runners, and cannot be loaded: {reason}")
                    delay = min(2 * delay, longest)
                    continue
                if not self._is_wanted(version):
                    self._classifier.unload(fresh.load)
                    break
                self._make_room(1)
                self._add(fresh)
                break
        self._registry.lost_versions.discard(version)
        self.on_lost(version.name, False)

    async def _test_on_demand(self, version: ModelVersion) -> None:
        """Try a version that a request asks for, one at a time. Raises `ModelError`.

        Callers that waited for a trial that failed get the error without another trial.
        """
        async with self._test_lock:
            if time.monotonic() - self._failure_times.get(version, -_RETRY_SECONDS) < _RETRY_SECONDS:
                raise ModelError("it could not be loaded a moment ago")
            if version not in self._tested_versions:
                try:
                    await self._run_shadow_test(version, None)
                except ModelError as error:
                    if not isinstance(error, Interrupted):
                        self.on_refused(version, to_one_line(error), is_lasting(error))
                    now = time.monotonic()
                    self._failure_times = {
                        one: at for one, at in self._failure_times.items() if now - at < _RETRY_SECONDS
                    }
                    self._failure_times[version] = now
                    raise

    def _has_room(self) -> bool:
        """Return whether another model may be loaded. Prepared models count too."""
        max_models = self._settings.models_loaded
        prepared_count = sum(len(one.loaded_versions) for one in self._prepared_changes.values())
        return not max_models or len(self._registry.models) + prepared_count < max_models

    def _make_room(self, count: int, *, keep: Sequence[LiveModel] = ()) -> None:
        """Retire models until there is room for `count` more.

        Idle models are retired first, the least recently used before others. Models in `keep` are retired
        last, in order.
        """
        max_models = self._settings.models_loaded
        ranks = {model: rank for rank, model in enumerate(keep, 1)}
        while max_models and (models := self._registry.models) and len(models) + count > max_models:

            def order(model: LiveModel) -> tuple[int, bool, float]:
                return (
                    -ranks[model] if model in ranks else -len(ranks) - 1,
                    model.active_requests > 0,
                    model.last_used,
                )

            self._classifier.retire(min(models, key=order))

    def close(self) -> None:
        """Cancel the running trial and the pending loads."""
        self._shadow_tests.close()
        for task in (*self._load_tasks, *self._reload_tasks):
            task.cancel()

    # --- one file ---

    async def _test_change(self, name: str | None, version: ModelVersion, *, force: bool) -> None:
        """Try a version of a change unless it has been tried before. Raises `ModelError`."""
        if version not in self._tested_versions:
            async with self._test_lock:
                live = self._registry.list_live_versions(name)  # read it now: the lock may have taken minutes
                await self._run_shadow_test(version, live[-1] if live and not force else None)

    async def _load(self, version: ModelVersion) -> _LoadedVersion:
        """Load a version in all runners. Raises `ModelError`."""
        load = self._classifier.create_load(version)
        try:
            return _LoadedVersion(version, load, await self._classifier.runners.load_model(load))
        except BaseException:  # the runners no longer use the file
            self._classifier.close_file(load)
            raise

    def _add(self, fresh: _LoadedVersion) -> LiveModel:
        """Serve a loaded version and count the change."""
        model = self._classifier.add_model(*fresh)
        self._metrics.model_changes.labels(model.name, "loaded").inc()
        return model

    async def _run_shadow_test(self, version: ModelVersion, current: LiveModel | None) -> None:
        """Run a version's trial. Raises `ModelError` when the version cannot be served."""
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
        self._tested_versions[version] = None
        if len(self._tested_versions) > _MAX_TESTED:
            del self._tested_versions[next(iter(self._tested_versions))]

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
