"""Changes to the served models: a version is tried, loaded beside the others, and switched to at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from fovea.service.artifact.repository import ModelVersion, RefusedVersion
from fovea.service.errors import Interrupted, ModelError, NotReady, one_line
from fovea.service.rollout.trial import Trials, Verdict, change_limit, check, is_lasting
from fovea.service.runners.memory_plan import estimate_process_bytes
from fovea.service.runners.messages import LoadCommand, LoadedModel
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.registry import LiveModel

log = logging.getLogger(__name__)

_RETRY: Final = 5.0
"""Time in seconds before a model that could not be loaded on demand is tried again."""


_REVIVE: Final = (1.0, 30.0)
"""Time in seconds before a lost model is loaded again: the first delay, which doubles each time, and the
maximum."""


_TRIED: Final = 1000
"""Maximum number of remembered files that have passed their trial."""


class _Fresh(NamedTuple):
    """Model that the runners have loaded but that is not serving yet."""

    found: ModelVersion
    load: LoadCommand
    loaded: LoadedModel


@dataclass(eq=False)
class _Prepared:
    """Future versions of one model."""

    found: Sequence[ModelVersion]
    fresh: list[_Fresh] = field(default_factory=list)


class Steward:
    """Manager of the loaded models in one process. Every method must be called on the event loop."""

    def __init__(self, classifier: Classifier) -> None:
        settings = classifier.settings
        self._settings = settings
        self._classifier = classifier
        self._repository = classifier.repository
        self._metrics = classifier.metrics
        self._trials = Trials(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        self._trying = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._prepared: dict[str | None, _Prepared] = {}
        self._tried = dict.fromkeys(model.found for model in self._repository.models)
        self._failed: dict[ModelVersion, float] = {}
        """Time of the last failed load on demand, on the monotonic clock in seconds, by version."""
        self._waking: set[asyncio.Task[LiveModel]] = set()
        self._reviving: set[asyncio.Task[None]] = set()
        self.on_lost: Callable[[str | None, bool], None] = lambda name, is_lost: None
        """Callback with a model's name: the model has been lost with all its runners (True), or is back
        (False)."""
        self.on_refused: Callable[[ModelVersion, str, bool], None] = lambda found, reason, lasts: None
        """Callback for a resting model that fails its trial: the version, the reason, and whether the refusal
        is lasting."""

    @property
    def patience(self) -> float:
        """Return the time limit in seconds of a change: a trial, and then a load in each runner."""
        return change_limit(self._settings.trial_seconds)

    # --- changes ---

    async def prepare(self, name: str | None, found: Sequence[ModelVersion], *, force: bool = False) -> None:
        """Load the versions in `found`, which `commit` will make the served versions of one model.

        The latest version is loaded if any version of the model is loaded now, or if there is room. Other
        versions are loaded if there is room. With `force`, the versions are not compared with the served
        version.

        Raises `ModelError` when a version cannot be served. In that case nothing has changed.
        """
        self.abandon(name)
        prepared = self._prepared[name] = _Prepared(found)
        try:
            for one in reversed(found):
                live = self._repository.live(name)
                is_latest = one is found[-1]
                if all(model.found != one for model in live) and ((live and is_latest) or self._has_room()):
                    fresh = await self._prepare(name, one, force=force)
                    if self._prepared.get(name) is not prepared:  # abandoned during the load: unload it here
                        self._classifier.unload(fresh.load)
                        break
                    prepared.fresh.append(fresh)
            if self._prepared.get(name) is not prepared:
                raise Interrupted("the change was given up meanwhile")
        except BaseException:
            fresh_ones, prepared.fresh = prepared.fresh, []
            for fresh in fresh_ones:
                self._classifier.unload(fresh.load)
            if self._prepared.get(name) is prepared:
                del self._prepared[name]
            raise

    def commit(self, name: str | None) -> None:
        """Switch to the prepared versions.

        Replaced versions are unloaded when their last request is answered.
        """
        prepared = self._prepared.pop(name)
        before = self._repository.live(name)
        self._repository.changes += 1
        if prepared.found:
            self._repository.shelf[name] = tuple(prepared.found)
        else:
            self._repository.shelf.pop(name, None)
        self._repository.lost -= {one for one in self._repository.lost if one.name == name}
        # Add the new versions before the old ones are retired: at no moment is the model without a version.
        added = [self._add(fresh) for fresh in prepared.fresh]
        for model in before:
            if model.found not in prepared.found:
                self._classifier.retire(model)
        self._make_room(0, keep=added)

    def choose(self, default: str | None) -> None:
        """Set the default model, as `service.rollout.watcher.Stage` describes."""
        self._repository.choose(default)

    def note(self, refused: Sequence[RefusedVersion], *, waits: bool) -> None:
        """Remember the refused versions, as `service.rollout.watcher.Stage` describes."""
        self._repository.note(refused, waits=waits)

    def abandon(self, name: str | None) -> None:
        """Drop a prepared change, including one that is still being prepared."""
        if prepared := self._prepared.pop(name, None):
            fresh, prepared.fresh = prepared.fresh, []
            for one in fresh:
                self._classifier.unload(one.load)

    # --- models that rest ---

    async def wake(self, name: str | None, version: str | None) -> LiveModel:
        """Return the requested model, and load it first if it is resting.

        The least recently used model makes room.

        The caller holds the model as after `LiveModel.take`. Raises `NotReady` when the model cannot be
        loaded, and `ModelNotFound` when it has been removed meanwhile.
        """
        task = asyncio.get_running_loop().create_task(self._wake(name, version))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)
        try:
            # A load goes on when one caller leaves: other callers may wait for the same model.
            return await asyncio.shield(task)
        except ModelError as error:
            log.error(f"model {name} cannot be loaded: {one_line(error)}")
            message = f"model {name!r} could not be loaded; the log says why"
            raise NotReady(message, retry_after=_RETRY) from None
        except asyncio.CancelledError:
            # The task still takes the model for this caller: release the model when the task is done.
            task.add_done_callback(_release)
            raise

    async def _wake(self, name: str | None, version: str | None) -> LiveModel:
        """Try and load the requested model, and take it."""
        while True:
            found = self._repository.get(name, version)
            if isinstance(found, ModelVersion) and found not in self._tried:
                await self._try_for_somebody(found)
            async with self._loading:
                # The model may have changed while this waited for the trial and the lock: look it up again.
                model = self._repository.get(name, version)
                if model == found and isinstance(model, ModelVersion):
                    self._make_room(1)
                    fresh = await self._load(model)
                    if not self._is_wanted(model):  # unloaded or replaced meanwhile
                        self._classifier.unload(fresh.load)
                        continue
                    model = self._add(fresh)
                    self._make_room(0, keep=[model])
                if isinstance(model, LiveModel):
                    model.take()
                    return model

    def _is_wanted(self, found: ModelVersion) -> bool:
        """Return whether a version is to be served but not loaded."""
        shelved = found in self._repository.shelf.get(found.name, ())
        return shelved and all(model.found != found for model in self._repository.models)

    # --- models that were lost ---

    def forfeit(self, slot: int, model: LiveModel | None) -> None:
        """Load a lost model again as soon as its file allows. See `Classifier.on_forfeit`."""
        for prepared in self._prepared.values():
            for fresh in [one for one in prepared.fresh if one.load.model_id == slot]:
                prepared.fresh.remove(fresh)  # it becomes a resting version
                self._classifier.let_go(fresh.load)
        if model is None or model.found not in self._repository.shelf.get(model.found.name, ()):
            return
        self._repository.lost.add(model.found)
        self.on_lost(model.found.name, True)
        task = asyncio.get_running_loop().create_task(self._revive(model.found))
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)

    async def _revive(self, found: ModelVersion) -> None:
        """Load a lost model again, with growing delays, until it is loaded or no longer wanted."""
        delay, longest = _REVIVE
        while True:
            await asyncio.sleep(delay)
            async with self._loading:
                if not self._is_wanted(found):
                    break
                try:
                    fresh = await self._load(found)
                except ModelError as error:
                    log.error(
                        f"{found.path} was lost with all runners, and cannot be loaded: {one_line(error)}"
                    )
                    delay = min(2 * delay, longest)
                    continue
                if not self._is_wanted(found):
                    self._classifier.unload(fresh.load)
                    break
                self._make_room(1)
                self._add(fresh)
                break
        self._repository.lost.discard(found)
        self.on_lost(found.name, False)

    async def _try_for_somebody(self, found: ModelVersion) -> None:
        """Try a version that a request asks for, one at a time. Raises `ModelError`.

        Callers that waited for a trial that failed get the error without another trial.
        """
        async with self._trying:
            if time.monotonic() - self._failed.get(found, -_RETRY) < _RETRY:
                raise ModelError("it could not be loaded a moment ago")
            if found not in self._tried:
                try:
                    await self._try(found, None)
                except ModelError as error:
                    if not isinstance(error, Interrupted):
                        self.on_refused(found, one_line(error), is_lasting(error))
                    now = time.monotonic()
                    self._failed = {one: at for one, at in self._failed.items() if now - at < _RETRY}
                    self._failed[found] = now
                    raise

    def _has_room(self) -> bool:
        """Return whether another model may be loaded. Prepared models count too."""
        most = self._settings.models_loaded
        prepared = sum(len(one.fresh) for one in self._prepared.values())
        return not most or len(self._repository.models) + prepared < most

    def _make_room(self, count: int, *, keep: Sequence[LiveModel] = ()) -> None:
        """Retire models until there is room for `count` more.

        Idle models are retired first, the least recently used before others. Models in `keep` are retired
        last, in order.
        """
        most = self._settings.models_loaded
        places = {model: place for place, model in enumerate(keep, 1)}
        while most and (models := self._repository.models) and len(models) + count > most:

            def order(model: LiveModel) -> tuple[int, bool, float]:
                return -places[model] if model in places else -len(places) - 1, model.users > 0, model.used

            self._classifier.retire(min(models, key=order))

    def close(self) -> None:
        """Cancel the running trial and the pending loads."""
        self._trials.close()
        for task in (*self._waking, *self._reviving):
            task.cancel()

    # --- one file ---

    async def _prepare(self, name: str | None, found: ModelVersion, *, force: bool) -> _Fresh:
        """Try a version unless it has been tried before, and load it in all runners. Raises `ModelError`."""
        if found not in self._tried:
            async with self._trying:
                live = self._repository.live(name)  # read it now: the lock may have taken minutes
                await self._try(found, live[-1] if live and not force else None)
        async with self._loading:
            return await self._load(found)

    async def _load(self, found: ModelVersion) -> _Fresh:
        """Load a version in all runners. Raises `ModelError`."""
        load = self._classifier.load_of(found)
        try:
            return _Fresh(found, load, await self._classifier.runners.load_model(load))
        except BaseException:  # the runners no longer use the file
            self._classifier.let_go(load)
            raise

    def _add(self, fresh: _Fresh) -> LiveModel:
        """Serve a loaded version and count the change."""
        model = self._classifier.add(*fresh)
        self._metrics.model_changes.labels(model.name, "loaded").inc()
        return model

    async def _try(self, found: ModelVersion, current: LiveModel | None) -> None:
        """Run a version's trial. Raises `ModelError` when the version cannot be served."""
        name = current.name if current else found.name or found.path.stem
        load = self._classifier.load_of(found)
        beside = self._narrow(current.load) if current else None
        give_back = None
        if current:
            current.take()  # keep its file open: the trial compares with it
        try:
            give_back = await self._memory_for_trial(load, beside)
            images = self._classifier.replay(current.name) if current else []
            verdict = await asyncio.to_thread(self._trials.run, self._narrow(load), beside, images)
            if current and verdict.images:
                self._tell(found, current, verdict)
                check(verdict, self._settings.swap_flips, self._settings.swap_slowdown)
        except ModelError as error:
            if not isinstance(error, Interrupted):
                self._metrics.model_changes.labels(name, "refused").inc()
            raise
        finally:
            if current:
                current.release()
            self._classifier.let_go(load)
            if give_back:
                give_back()
        self._tried[found] = None
        if len(self._tried) > _TRIED:
            del self._tried[next(iter(self._tried))]

    async def _memory_for_trial(
        self, load: LoadCommand, beside: LoadCommand | None
    ) -> Callable[[], None] | None:
        """Reserve memory for a trial and return the function that releases it; None if memory is not limited.

        Explanations give way to a trial. Raises `Interrupted` when memory does not become free. The version
        is then tried again at a later look.
        """
        spare = self._classifier.spare
        if spare is None:
            return None
        size = estimate_process_bytes([one for one in (load, beside) if one]) + spare.decode_bytes
        give_back = await spare.claim(size)
        if give_back is None:
            raise Interrupted(
                f"its trial needs {size >> 20} MB of memory, which is not free now: the container is limited"
            )
        return give_back

    def _narrow(self, load: LoadCommand) -> LoadCommand:
        """Return a load message with one thread.

        A trial must not take processor time from requests, and single-threaded timings compare best.
        """
        spare = self._classifier.spare
        decode_bytes = spare.decode_bytes if spare else load.plan.decode_bytes
        plan = replace(load.plan, threads=1, wide_threads=0, processes=1, decode_bytes=decode_bytes)
        return replace(load, plan=plan)

    def _tell(self, found: ModelVersion, current: LiveModel, verdict: Verdict) -> None:
        """Set the metrics of a comparison and log it."""
        self._metrics.swap_flip_ratio.labels(current.name).set(verdict.flip_rate)
        self._metrics.swap_slowdown_ratio.labels(current.name).set(verdict.slowdown)
        log.info(
            f"model {current.name}: {found.path} gives {verdict.flips} of the last {verdict.images} images "
            f"another label than version {current.version}, and takes {verdict.slowdown:.2f} times as long"
        )


def _release(task: asyncio.Task[LiveModel]) -> None:
    """Release a model whose caller has left while the model was loading."""
    if not task.cancelled() and task.exception() is None:
        task.result().release()
