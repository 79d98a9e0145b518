"""Watcher of the repository. It looks regularly, and serves changes that have settled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from fovea.service.artifact import repository
from fovea.service.artifact.repository import ModelVersion, RefusedVersion, ServingState
from fovea.service.errors import FoveaError, Interrupted, ModelError, ModelNotFound, SwapRefused, one_line
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.trial import is_lasting

log = logging.getLogger(__name__)

_SETTLE: float = 0.1
"""Time in seconds for which a file must stay unchanged when a request asks to load it."""

_LACKING: Final = 2.0
"""Time in seconds between two looks while a model is missing, if the repository is not watched otherwise."""

_BACK_OFF: Final = (2.0, 300.0)
"""Time in seconds before an interrupted change is tried again: the delay after the second interruption, which
doubles each time, and the maximum. The file was not the cause of the interruption."""


class Stage(Protocol):
    """Interface that applies a change: in this process, or in all workers."""

    async def prepare(self, name: str | None, found: Sequence[ModelVersion], *, force: bool = False) -> None:
        """Load versions of a model. Raises `ModelError`; in that case nothing has changed.

        With `force`, the versions are not compared with the served version.
        """

    def commit(self, name: str | None) -> None:
        """Switch to the prepared versions at once."""

    def choose(self, default: str | None) -> None:
        """Set the model that answers requests that name no model."""

    def note(self, refused: Sequence[RefusedVersion], *, waits: bool) -> None:
        """Remember the versions that are refused, and whether the repository has no version to serve."""


class _Choice(NamedTuple):
    """Versions of one model that should be served now."""

    found: tuple[ModelVersion, ...]
    refused: tuple[RefusedVersion, ...]
    force: bool
    """True to skip the comparison."""


class _Interruptions(NamedTuple):
    """Number of consecutive interruptions of a change, and the time of the next attempt."""

    found: tuple[ModelVersion, ...]
    times: int
    again: float
    """Time of the next attempt on the monotonic clock in seconds."""


class Watch:
    """Watcher of one repository. Every method must be called on the event loop."""

    def __init__(
        self,
        root: Path,
        served: ServingState,
        stage: Stage,
        *,
        named: str | None = None,
        refusals: Refusals | None = None,
        limits: bool = False,
        patience: float = 3600.0,
        is_broken: Callable[[ModelVersion], bool] = lambda found: False,
    ) -> None:
        """Start from `served`, the current state.

        With `named`, the repository does not choose the default model.

        With `limits`, a version that passes its comparison is remembered, so that no other service with the
        same verdicts refuses it. A requested change waits at most `patience` seconds for other changes.
        `is_broken` returns whether a starting process cannot load a version. It may be called in any thread.
        """
        self._root = root
        self._named = named
        self._shelf = dict(served.versions_by_model)
        self._default = served.default_model
        self._stage = stage
        self._refusals = refusals or Refusals()
        self._limits = limits
        self._patience = patience
        self._is_broken = is_broken
        self._blaming: asyncio.Task[None] | None = None
        self._seen: dict[str | None, Sequence[ModelVersion]] = dict(served.versions_by_model)
        self._refused: dict[str | None, Sequence[ModelVersion]] = {}
        self._interrupted: dict[str | None, _Interruptions] = {}
        self._complaints: dict[str | None, str] = {}
        self._pinned: dict[str | None, str] = {}
        """Requested versions by model."""
        self._unloaded: set[str | None] = set()
        """Models that were unloaded by request."""
        self._lost: dict[str | None, int] = {}
        """Number of processes that have lost a model with all their runners, by model."""
        self._wanted: set[str | None] = set()
        """Models to look at even if the repository is not watched."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes: dict[str, tuple[RefusedVersion, ...]] = {}
        for one in served.refused_versions:
            self._notes[one.name] = (*self._notes.get(one.name, ()), one)
        self._noted = served.refused_versions, served.is_empty
        self._one = asyncio.Lock()

    @property
    def served(self) -> ServingState:
        """Return the current state."""
        return ServingState(self._shelf, self._default, *self._noted)

    async def run(self, every: float) -> None:
        """Look every `every` seconds for ever. With 0, look only while a model is missing."""
        while True:
            await asyncio.sleep(every or _LACKING)
            if every or self._noted[1]:
                await self._look_or_log()
            elif self._lost or self._wanted:
                await self._look_or_log({*self._lost, *self._wanted})

    async def reload(self) -> None:
        """Look now, and look again after new files have had time to settle."""
        log.info("looks at the repository, as SIGHUP asks")
        await self._look_or_log()
        await asyncio.sleep(_SETTLE)
        await self._look_or_log()

    async def _look_or_log(self, only: set[str | None] | None = None) -> None:
        """Look, and log any exception."""
        try:
            await self.look(only)
        except Exception:  # the next look may succeed; served models stay
            log.exception("the repository could not be looked at")

    def lost(self, name: str | None, is_lost: bool) -> None:
        """Count a process that has lost a model with all its runners, or has the model again."""
        count = self._lost.get(name, 0) + (1 if is_lost else -1)
        if count > 0:
            self._lost[name] = count
        else:
            self._lost.pop(name, None)

    def refuse(self, found: ModelVersion, reason: str, lasting: bool) -> None:
        """Refuse a resting version that failed its trial on demand.

        Another version takes its place at the next look.
        """

        async def keep() -> None:
            async with self._one:
                await asyncio.to_thread(self._refusals.refuse, found, reason, lasting=lasting)
                self._wanted.add(found.name)

        # This is a callback and cannot wait for the lock. The set keeps the task from being collected.
        task = asyncio.get_running_loop().create_task(keep())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def start_failed(self) -> None:
        """Replace broken versions, because a worker could not start with the served versions.

        Otherwise there would be no worker left once the last one had died.
        """
        if self._blaming is None or self._blaming.done():
            self._blaming = asyncio.get_running_loop().create_task(self._replace_broken())

    async def _replace_broken(self) -> None:
        """Replace the served versions that a starting process cannot load."""
        async with self._one:
            for name, found in list(self._shelf.items()):
                broken = [await asyncio.to_thread(self._is_broken, one) for one in found]
                if name is not None and any(broken):
                    log.error(f"no worker that starts can load {found[-1].path}: another version is served")
                    try:
                        await self._replace_one(name)
                    except (FoveaError, OSError) as error:
                        log.error(f"there is no other version of model {name} now: {one_line(error)}")
            await self._choose()
            self._note()

    async def _replace_one(self, name: str) -> None:
        """Serve the latest version that is not refused, or none if there is none.

        Raises `FoveaError` or `OSError`.
        """
        tried: set[tuple[ModelVersion, ...]] = set()
        while True:
            choice = await self._choice(name, None)
            self._keep_note(name, choice.refused)
            if choice.found in tried:
                return
            tried.add(choice.found)
            try:
                await self._change(name, choice.found, force=True)
            except SwapRefused as error:
                self._complain(name, error)
                continue
            return

    async def look(self, only: set[str | None] | None = None) -> None:
        """Bring the served versions up to date with the repository.

        A new version is served once it has not changed since the last look. Versions that are gone are not
        served any more. With `only`, look at these models alone.
        """
        async with self._one:
            try:
                names = await asyncio.to_thread(self._names)
            except ModelError as error:
                self._complain(None, error)
                return
            for gone in self._notes.keys() - names:  # except the default model, which is awaited
                self._notes[gone] = tuple(one for one in self._notes[gone] if not one.version)
            for name in names - self._unloaded:
                if only is not None and name not in only:
                    continue
                pinned = self._pinned.get(name)
                if name and pinned and not (self._root / name / pinned).is_dir():
                    del self._pinned[name]
                    pinned = None
                try:
                    choice = await self._choice(name, pinned)
                except ModelError as error:
                    self._complain(name, error)
                    continue
                except OSError as error:
                    self._complain(name, ModelError(f"it cannot be looked at: {error.strerror}"))
                    continue
                await self._reconcile(name, choice)
            await self._choose()
            self._note()

    async def _reconcile(self, name: str | None, choice: _Choice) -> None:
        """Serve the chosen versions if they have settled and are not refused."""
        found = choice.found
        has_settled = self._seen.get(name) == found
        self._seen[name] = found
        if found or choice.refused or name in self._shelf:
            self._keep_note(name, choice.refused)
        if has_settled and found == self._shelf.get(name, ()):
            self._wanted.discard(name)
        if not has_settled or found in (self._shelf.get(name, ()), self._refused.get(name)):
            return
        if choice.refused and not found:  # there is no replacement for the served versions
            return
        interrupted = self._interrupted.get(name)
        if interrupted and interrupted.found == found and time.monotonic() < interrupted.again:
            return
        await self._change_or_log(name, found, force=choice.force)

    def _keep_note(self, name: str | None, refused: tuple[RefusedVersion, ...]) -> None:
        """Keep the refusals of a model for the status report.

        While a model is served, a refused pinned version counts as missing only if it was missing at the
        start. Otherwise the refused version was only meant to replace the served version.
        """
        if name is None:
            return
        if name in self._shelf:
            started = {one[:2] for one in self._notes.get(name, ()) if one.is_pinned}
            refused = tuple(one._replace(is_pinned=one.is_pinned and one[:2] in started) for one in refused)
        self._notes[name] = refused

    def _note(self) -> None:
        """Report the refused versions if they have changed."""
        waits = not self._shelf and not self._unloaded
        refused = tuple(
            one
            for name, notes in sorted(self._notes.items())
            for one in notes
            if name not in self._unloaded and not (one.version == "" and name in self._shelf)
        )
        if (refused, waits) != self._noted:
            self._noted = refused, waits
            self._stage.note(refused, waits=waits)

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Serve a version of a model and keep serving it. Without `version`, the repository chooses.

        `name` is None for a single file. A refused version is served all the same if the request names its
        number and its file is sound. Raises `SwapRefused`, or `ModelNotFound` when there is no such model.
        """
        async with self._turn():
            try:
                if name not in await asyncio.to_thread(self._names):
                    raise ModelError(f"the repository has no model {name!r}")
                found = await self._find(name, version)
                await asyncio.sleep(_SETTLE)
                if found != await self._find(name, version):
                    raise SwapRefused(f"the file of model {name!r} is still being written")
            except ModelError as error:
                raise ModelNotFound(one_line(error)) from None
            if not found:
                raise ModelNotFound(f"the repository has no model {name!r}")
            reasons = [await asyncio.to_thread(self._refusals.reason, one) for one in found]
            if found != self._shelf.get(name, ()):
                await self._change(name, found, force=bool(version and any(reasons)))
            self._unloaded.discard(name)
            self._pinned.pop(name, None)
            if version:
                self._pinned[name] = version
            if name is not None:
                self._notes.pop(name, None)
            for one, reason in zip(found, reasons, strict=True):
                if reason:
                    text = f"loaded by request though it had been refused: {reason}"
                    await asyncio.to_thread(self._refusals.accept, one, text)
            await self._choose()
            self._note()

    async def unload(self, name: str | None) -> None:
        """Stop serving a model until it is loaded again. Raises `ModelNotFound` when it is not served."""
        async with self._turn():
            if name not in self._shelf:
                raise ModelNotFound(f"model {name!r} is not served")
            await self._change(name, ())
            self._unloaded.add(name)
            await self._choose()
            self._note()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Hold the lock for a change. Raises `SwapRefused` when other changes take too long."""
        try:
            async with asyncio.timeout(self._patience):
                await self._one.acquire()
        except TimeoutError:
            raise SwapRefused(
                f"another change has been under way for more than {self._patience:g} s; ask again later"
            ) from None
        try:
            yield
        finally:
            self._one.release()

    async def _choose(self) -> None:
        """Set the default model: the named model, or else the current default or the only model."""
        if None in self._shelf:
            return
        try:
            named = self._named or await asyncio.to_thread(repository.read_default_model, self._root)
            if named and named not in {*self._shelf, *self._notes, self._default}:
                raise ModelError(
                    f"{self._root / repository.DEFAULT_MODEL_FILE} is {named!r}, which is not served"
                )
        except ModelError as error:
            self._complain(None, error)
            return
        self._complaints.pop(None, None)
        known = {*self._shelf, *(name for name, notes in self._notes.items() if notes)} - self._unloaded
        default = named or (self._default if self._default in known else repository.find_single_model(known))
        if default != self._default:
            self._default = default
            self._stage.choose(default)
            log.info(f"the default model is {default} from now on" if default else "no model is the default")

    def _names(self) -> set[str | None]:
        """Return the names of the models in the repository and of the served models.

        An empty repository is taken for one that is not mounted, so that no model is removed. Raises
        `ModelError` then.
        """
        if self._root.is_file() or None in self._shelf:
            return {None}
        names = repository.list_model_names(self._root)
        if not names and self._shelf:
            raise ModelError(f"the repository {self._root} is empty; what is served stays")
        return {*names, *self._shelf}

    async def _find(self, name: str | None, version: str | None) -> tuple[ModelVersion, ...]:
        """Return the versions of a model that its folder asks for."""
        if name is not None and not (self._root / name).is_dir():
            return ()
        return await asyncio.to_thread(repository.find_versions, self._root, name, version)

    async def _choice(self, name: str | None, pinned: str | None) -> _Choice:
        """Choose the versions of a model by its folder, by a requested version, and by the refusals."""
        if name is None or pinned or not (self._root / name).is_dir():
            return _Choice(await self._find(name, pinned), (), force=False)
        return await asyncio.to_thread(self._choose_versions, name)

    def _choose_versions(self, name: str) -> _Choice:
        """Choose the versions of a model by its folder and the refusals.

        Runs in a thread, because it reads files.
        """
        choice = repository.choose_versions(self._root, name, self._refusals.reason)
        if any(one.is_pinned for one in choice.refused_versions):  # all configured versions or no change
            return _Choice((), choice.refused_versions, force=False)
        served = self._shelf.get(name, ())
        refused_elsewhere = any(self._refusals.reason(one) for one in served)
        let_in = bool(choice.versions) and self._refusals.is_accepted(choice.versions[-1])
        return _Choice(choice.versions, choice.refused_versions, force=refused_elsewhere or let_in)

    async def _change_or_log(self, name: str | None, found: Sequence[ModelVersion], *, force: bool) -> None:
        """Make a change, or log why it is refused."""
        try:
            await self._change(name, found, force=force)
        except SwapRefused as error:
            self._complain(name, error)

    async def _change(self, name: str | None, found: Sequence[ModelVersion], *, force: bool = False) -> None:
        """Prepare and commit a change. Raises `SwapRefused`; in that case nothing has changed."""
        try:
            await self._stage.prepare(name, found, force=force)
        except Interrupted as error:
            self._put_off(name, found)
            raise SwapRefused(one_line(error)) from None
        except ModelError as error:
            reason = one_line(error)
            if name is None or len(found) != 1:  # no version, or the failed one is unknown
                self._refused[name] = found
            else:
                await self._keep_refusal(found[0], reason, lasting=is_lasting(error))
            raise SwapRefused(reason) from None
        # Nothing may be awaited between `prepare` and `commit`: the prepared state could become outdated.
        self._stage.commit(name)
        self._refused.pop(name, None)
        self._interrupted.pop(name, None)
        self._lost.pop(name, None)
        self._complaints.pop(name, None)
        if name is not None:
            self._notes[name] = tuple(
                one for one in self._notes.get(name, ()) if one.version and not one.is_pinned
            )
        if found:
            self._shelf[name] = tuple(found)
        else:
            self._shelf.pop(name, None)
        if self._limits and name is not None:
            await asyncio.to_thread(self._accept, found)
        served = ", ".join(str(one.path) for one in found) or f"model {name} no more"
        log.info(f"now serves {served}")

    async def _keep_refusal(self, found: ModelVersion, reason: str, *, lasting: bool) -> None:
        """Store and report a refusal."""
        await asyncio.to_thread(self._refusals.refuse, found, reason, lasting=lasting)
        name, where = found.name or "", self._refusals.path(found)
        if lasting and self._complaints.get(found.name) != reason:
            log.error(
                f"model {name} version {found.version} is refused from now on. To have it served all the "
                f"same, load it by request with its number; to have it tried again, delete {where}"
            )
        shown = reason.removeprefix(f"{found.path}: ")  # callers see the reason, but no local paths
        self._notes[name] = (RefusedVersion(name, found.version or "", shown),)
        self._note()

    def _accept(self, found: Sequence[ModelVersion]) -> None:
        """Store the acceptance of versions that passed their comparison.

        A refusal by another service takes precedence.
        """
        for one in found:
            if self._refusals.reason(one) is None and not self._refusals.is_accepted(one):
                self._refusals.accept(one, "it passed its trial")

    def _put_off(self, name: str | None, found: Sequence[ModelVersion]) -> None:
        """Schedule an interrupted change again: at the next look, then with growing delays."""
        before = self._interrupted.get(name)
        count = before.times + 1 if before and before.found == tuple(found) else 0
        shortest, longest = _BACK_OFF
        delay = min(longest, shortest * 2 ** min(count, 16)) if count else 0.0
        self._interrupted[name] = _Interruptions(tuple(found), count, time.monotonic() + delay)

    def _complain(self, name: str | None, error: FoveaError) -> None:
        """Log an error once, not at every look."""
        said = one_line(error)
        if self._complaints.get(name) != said:
            self._complaints[name] = said
            log.error(f"{'the repository' if name is None else f'model {name}'} stays as it is: {said}")
