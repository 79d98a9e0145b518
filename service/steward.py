"""Changes what is served: a version is tried, loaded beside the others, and switched to at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from service.classifier import Classifier
from service.errors import Interrupted, ModelError, NotReady, one_line
from service.layout import Found
from service.messages import Load, Loaded
from service.repository import LiveModel
from service.trials import Trials, Verdict

log = logging.getLogger(__name__)

_RETRY: Final = 5.0
"""Seconds for which a model that could not be loaded is not tried again for whoever asks for it."""


_TRIED: Final = 1000
"""Files of which it is remembered that they may be served."""


class _Fresh(NamedTuple):
    """A model that the runners have, and nobody is answered by yet."""

    found: Found
    load: Load
    loaded: Loaded


@dataclass(eq=False)
class _Prepared:
    """What one model's versions will be."""

    found: Sequence[Found]
    fresh: list[_Fresh] = field(default_factory=list)


class Steward:
    """All methods are for the event loop."""

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
        self._failed: dict[Found, float] = {}
        """When a model could not be loaded for whoever asked."""
        self._waking: set[asyncio.Task[LiveModel]] = set()

    # --- changes ---

    async def prepare(self, name: str | None, found: Sequence[Found]) -> None:
        """Have all of `found` ready, the versions of one model that are to be served from `commit` on.

        The latest is loaded if any is now, or if there is room; others if there is room.
        Raises `ModelError` when one cannot be served: then nothing has changed.
        """
        self.abandon(name)
        prepared = self._prepared[name] = _Prepared(found)
        try:
            for one in reversed(found):
                live = self._repository.live(name)
                is_latest = one is found[-1]
                if all(model.found != one for model in live) and ((live and is_latest) or self._has_room()):
                    prepared.fresh.append(await self._prepare(one, live[-1] if live else None))
            if self._prepared.get(name) is not prepared:
                raise Interrupted("the change was given up meanwhile")
        except BaseException:
            for fresh in prepared.fresh:
                self._classifier.unload(fresh.load)
            if self._prepared.get(name) is prepared:
                del self._prepared[name]
            raise

    def commit(self, name: str | None) -> None:
        """Switch to what was prepared; what it replaces is unloaded when it has answered all it was asked."""
        prepared = self._prepared.pop(name)
        before = self._repository.live(name)
        if prepared.found:
            self._repository.shelf[name] = tuple(prepared.found)
        else:
            self._repository.shelf.pop(name, None)
        for fresh in prepared.fresh:
            self._add(fresh)
        for model in before:
            if model.found not in prepared.found:
                self._classifier.retire(model)

    def choose(self, default: str | None) -> None:
        """See `service.watch.Stage`."""
        self._repository.choose(default)

    def abandon(self, name: str | None) -> None:
        """Forget what was prepared, or is being."""
        if prepared := self._prepared.pop(name, None):
            fresh, prepared.fresh = prepared.fresh, []
            for one in fresh:
                self._classifier.unload(one.load)

    # --- models that rest ---

    async def wake(self, name: str | None, version: str | None) -> LiveModel:
        """The model that is asked for, loaded if it rests; the least recently used goes for it.

        The caller has it as by `LiveModel.take`. Raises `NotReady` when it cannot be loaded, and
        `ModelNotFound` when it is gone meanwhile.
        """
        task = asyncio.get_running_loop().create_task(self._wake(name, version))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)
        try:
            return await asyncio.shield(task)
        except ModelError as error:
            log.error(f"model {name} cannot be loaded: {one_line(error)}")
            message = f"model {name!r} could not be loaded; the log says why"
            raise NotReady(message, retry_after=_RETRY) from None
        except asyncio.CancelledError:
            task.add_done_callback(_release)
            raise

    async def _wake(self, name: str | None, version: str | None) -> LiveModel:
        while True:
            found = self._repository.get(name, version)
            if isinstance(found, Found) and found not in self._tried:
                await self._try_for_somebody(found)
            async with self._loading:
                model = self._repository.get(name, version)
                if model == found and isinstance(model, Found):
                    self._make_room()
                    model = self._add(await self._load(model))
                if isinstance(model, LiveModel):
                    model.take()
                    return model

    async def _try_for_somebody(self, found: Found) -> None:
        """One after the other; whoever waited for one that failed is told so. Raises `ModelError`."""
        async with self._trying:
            if time.monotonic() - self._failed.get(found, -_RETRY) < _RETRY:
                raise ModelError("it could not be loaded a moment ago")
            if found not in self._tried:
                try:
                    await self._try(found, None)
                except ModelError:
                    now = time.monotonic()
                    self._failed = {one: at for one, at in self._failed.items() if now - at < _RETRY}
                    self._failed[found] = now
                    raise

    def _has_room(self) -> bool:
        most = self._settings.models_loaded
        return not most or len(self._repository.models) < most

    def _make_room(self) -> None:
        """Of the models that nobody needs now, if there are any, the least recently used goes."""
        while not self._has_room():
            models = sorted(self._repository.models, key=lambda model: (model.users > 0, model.used))
            self._classifier.retire(models[0])

    def close(self) -> None:
        """Give up what is under way."""
        self._trials.close()
        for task in self._waking:
            task.cancel()

    # --- one file ---

    async def _prepare(self, found: Found, current: LiveModel | None) -> _Fresh:
        """Try it, unless it was before, and load it in all runners. Raises `ModelError`."""
        if found not in self._tried:
            async with self._trying:
                await self._try(found, current)
        async with self._loading:
            return await self._load(found)

    async def _load(self, found: Found) -> _Fresh:
        """In all runners. Raises `ModelError`."""
        load = self._classifier.load_of(found)
        try:
            return _Fresh(found, load, await self._classifier.runners.load(load))
        except BaseException:  # the runners have let go of it
            self._classifier.let_go(load)
            raise

    def _add(self, fresh: _Fresh) -> LiveModel:
        model = self._classifier.add(*fresh)
        self._metrics.model_changes.labels(model.name, "loaded").inc()
        return model

    async def _try(self, found: Found, current: LiveModel | None) -> None:
        """Raises `ModelError` when it is not to be served."""
        name = current.name if current else found.name or found.path.stem
        load = self._classifier.load_of(found)
        images = self._classifier.replay(current.name) if current else []
        beside = _narrow(current.load) if current else None
        try:
            verdict = await asyncio.to_thread(self._trials.run, _narrow(load), beside, images)
            if current and verdict.images:
                self._tell(found, current, verdict)
                _check(verdict, self._settings.swap_flips, self._settings.swap_slowdown)
        except ModelError as error:
            if not isinstance(error, Interrupted):
                self._metrics.model_changes.labels(name, "refused").inc()
            raise
        finally:
            self._classifier.let_go(load)
        self._tried[found] = None
        if len(self._tried) > _TRIED:
            del self._tried[next(iter(self._tried))]

    def _tell(self, found: Found, current: LiveModel, verdict: Verdict) -> None:
        self._metrics.swap_flip_ratio.labels(current.name).set(verdict.flip_rate)
        self._metrics.swap_slowdown_ratio.labels(current.name).set(verdict.slowdown)
        log.info(
            f"model {current.name}: {found.path} gives {verdict.flips} of the last {verdict.images} images "
            f"another label than version {current.version}, and takes {verdict.slowdown:.2f} times as long"
        )


def _release(task: asyncio.Task[LiveModel]) -> None:
    """Who has woken a model has left."""
    if not task.cancelled() and task.exception() is None:
        task.result().release()


def _narrow(load: Load) -> Load:
    """With one thread: a trial must not take what others need, and compares best."""
    return replace(load, plan=replace(load.plan, threads=1, wide_threads=0, processes=1))


def _check(verdict: Verdict, flips: float, slowdown: float) -> None:
    if verdict.flip_rate > flips:
        raise ModelError(
            f"{verdict.flips} of the last {verdict.images} images would get another label: "
            f"{verdict.flip_rate:.1%}, at most {flips:.1%} (FOVEA_SWAP_FLIPS)"
        )
    if slowdown and verdict.slowdown > slowdown:
        raise ModelError(
            f"an image would take {verdict.slowdown:.2f} times as long; at most {slowdown:g} "
            "(FOVEA_SWAP_SLOWDOWN)"
        )
