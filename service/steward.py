"""Changes what is served: a version is tried, loaded beside the others, and switched to at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from service.classifier import Classifier
from service.errors import Interrupted, ModelError, NotReady, one_line
from service.layout import Found, stamp_of
from service.messages import Load, Loaded
from service.repository import LiveModel
from service.trials import Trials, Verdict

log = logging.getLogger(__name__)


_RETRY: Final = 5.0
"""Seconds after which somebody may ask again for a model that could not be loaded."""


class _Fresh(NamedTuple):
    """A model that the runners have, and nobody is answered by yet."""

    found: Found
    load: Load
    loaded: Loaded


@dataclass
class _Prepared:
    """What one model's versions will be."""

    found: Sequence[Found]
    fresh: list[_Fresh] = field(default_factory=list)


class Steward:
    """One change at a time. All methods are for the event loop."""

    def __init__(self, classifier: Classifier) -> None:
        settings = classifier.settings
        self._settings = settings
        self._classifier = classifier
        self._repository = classifier.repository
        self._metrics = classifier.metrics
        self._trials = Trials(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        self._one = asyncio.Lock()
        self._prepared: dict[str | None, _Prepared] = {}
        self._waking: dict[Found, asyncio.Task[LiveModel]] = {}
        self._tried = {model.found for model in self._repository.models}

    async def prepare(self, name: str | None, found: Sequence[Found]) -> None:
        """Have all of `found` ready, the versions of one model that are to be served from `commit` on.

        Raises `ModelError` when one cannot be served: then nothing has changed.
        """
        async with self._one:
            self.abandon(name)
            prepared = self._prepared[name] = _Prepared(found)
            live = self._live(name)
            known = {model.found for model in live}
            try:
                for one in found:
                    if one not in known and (live or self._has_room()):
                        prepared.fresh.append(await self._prepare(one, live[-1] if live else None))
            except BaseException:
                self.abandon(name)
                raise

    async def commit(self, name: str | None) -> None:
        """Switch to what was prepared; what it replaces is unloaded when it has answered all it was asked."""
        prepared = self._prepared.pop(name)
        before = self._live(name)
        if prepared.found:
            self._repository.shelf[name] = tuple(prepared.found)
        else:
            self._repository.shelf.pop(name, None)
        for fresh in prepared.fresh:
            self._classifier.add(*fresh)
        for model in before:
            if model.found not in prepared.found:
                self._classifier.retire(model)
        for fresh in prepared.fresh:
            self._metrics.model_changes.labels(_label(fresh.found), "loaded").inc()

    def abandon(self, name: str | None) -> None:
        """Forget what was prepared."""
        if prepared := self._prepared.pop(name, None):
            for fresh in prepared.fresh:
                self._classifier.runners.unload(fresh.load.slot)

    async def wake(self, found: Found) -> LiveModel:
        """Load a model that rests, as somebody asks for it; the least recently used goes for it.

        Raises `NotReady` when it cannot be.
        """
        if found not in self._waking:
            self._waking[found] = task = asyncio.get_running_loop().create_task(self._wake(found))
            task.add_done_callback(lambda task: self._woken(found, task))
        try:
            return await asyncio.shield(self._waking[found])
        except ModelError as error:
            log.error(f"model {found.name} version {found.version} cannot be loaded: {one_line(error)}")
            message = f"model {found.name!r} could not be loaded; the log says why"
            raise NotReady(message, retry_after=_RETRY) from None

    def _woken(self, found: Found, task: asyncio.Task[LiveModel]) -> None:
        del self._waking[found]
        if not task.cancelled():
            task.exception()  # all who asked may have left

    def close(self) -> None:
        """Give up what is under way."""
        self._trials.close()
        for task in self._waking.values():
            task.cancel()

    async def _wake(self, found: Found) -> LiveModel:
        async with self._one:
            model = self._repository.get(found.name, found.version)
            if isinstance(model, LiveModel):
                return model
            self._make_room()
            fresh = await self._prepare(found, None)
            self._metrics.model_changes.labels(_label(found), "loaded").inc()
            return self._classifier.add(*fresh)

    async def _prepare(self, found: Found, current: LiveModel | None) -> _Fresh:
        """Try it, unless it was before, and load it in all runners. Raises `ModelError`."""
        try:
            if found not in self._tried:
                await self._try(found, current)
            load = self._classifier.load_of(found)
            loaded = await self._classifier.runners.load(load)
            if stamp_of(found.path) != found.stamp:
                self._classifier.runners.unload(load.slot)
                raise ModelError(f"{found.path} was changed while it was loaded")
        except ModelError as error:
            if not isinstance(error, Interrupted):
                self._metrics.model_changes.labels(_label(found), "refused").inc()
            raise
        self._tried.add(found)
        return _Fresh(found, load, loaded)

    async def _try(self, found: Found, current: LiveModel | None) -> None:
        """Raises `ModelError` when it is not to be served."""
        load = _narrow(self._classifier.load_of(found))
        beside = _narrow(self._classifier.load_of(current.found)) if current else None
        images = self._classifier.replay(current.name) if current else []
        verdict = await asyncio.to_thread(self._trials.run, load, beside, images)
        if current is None or not verdict.images:
            return
        self._metrics.swap_flip_ratio.labels(current.name).set(verdict.flip_rate)
        self._metrics.swap_slowdown_ratio.labels(current.name).set(verdict.slowdown)
        log.info(
            f"model {current.name}: {found.path} gives {verdict.flips} of the last {verdict.images} images "
            f"another label than version {current.version}, and takes {verdict.slowdown:.2f} times as long"
        )
        _check(verdict, self._settings.swap_flips, self._settings.swap_slowdown)

    def _live(self, name: str | None) -> list[LiveModel]:
        """This model's versions; the only file is called what its contract says."""
        return [model for model in self._repository.models if model.found.name == name]

    def _has_room(self) -> bool:
        most = self._settings.models_loaded
        return not most or len(self._repository.models) < most

    def _make_room(self) -> None:
        while not self._has_room():
            self._classifier.retire(min(self._repository.models, key=lambda model: model.used))


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


def _label(found: Found) -> str:
    return found.name or found.path.stem
