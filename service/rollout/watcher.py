"""Watcher of the repository. It scans the repository regularly, and serves changes that have settled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from fovea.service.artifact import repository
from fovea.service.artifact.repository import ModelVersion, RefusedVersion, ServingState, VersionsByModel
from fovea.service.errors import FoveaError, Interrupted, ModelError, ModelNotFound, SwapRefused, to_one_line
from fovea.service.rollout.change_backoff import ChangeBackoff
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.rollout_target import RolloutTarget
from fovea.service.rollout.trial import is_lasting
from fovea.service.rollout.version_choice import VersionChoice, VersionChooser

log = logging.getLogger(__name__)

_SETTLE_SECONDS: float = 0.1
"""Time in seconds for which a file must stay unchanged when a request asks to load it."""

_MISSING_INTERVAL: Final = 2.0
"""Time in seconds between two scans while a model is missing, if the repository is not watched otherwise."""


class Watcher:
    """Watcher of one repository. Every method must be called on the event loop."""

    def __init__(
        self,
        root: Path,
        state: ServingState,
        target: RolloutTarget,
        *,
        configured_default: str | None = None,
        single_name: str | None = None,
        refusals: Refusals | None = None,
        has_limits: bool = False,
        change_timeout: float = 3600.0,
        is_broken: Callable[[ModelVersion], bool] = lambda version: False,
        update_copy: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Start from `state`, the current state.

        With `configured_default`, the repository does not choose the default model. `single_name` is the
        name of the model if the root has the versions of one model.

        With `has_limits`, a version that passes its comparison is remembered, so that no other service with
        the same verdicts refuses it. A requested change waits at most `change_timeout` seconds for other
        changes. `is_broken` returns whether a starting process cannot load a version. It is called in a
        worker thread, never twice at once, and may take as long as a trial. `update_copy` updates the
        repository if it is the copy of a store.
        """
        self._root = root
        self._configured_default = configured_default
        self._state = state
        self._default = state.default_model
        self._target = target
        self._refusals = refusals or Refusals()
        self._chooser = VersionChooser(root, self._refusals, single_name)
        self._has_limits = has_limits
        self._change_timeout = change_timeout
        self._is_broken = is_broken
        self._update_copy = update_copy
        self._replace_task: asyncio.Task[None] | None = None
        self._last_versions: dict[str | None, Sequence[ModelVersion]] = dict(state.versions_by_model)
        self._refused_changes: dict[str | None, Sequence[ModelVersion]] = {}
        self._backoff = ChangeBackoff()
        self._logged_errors: dict[str | None, str] = {}
        self._pinned_versions: dict[str | None, str] = {}
        """Requested versions by model."""
        self._unloaded_models: set[str | None] = set()
        """Models that were unloaded by request."""
        self._lost_counts: dict[str | None, int] = {}
        """Number of processes that have lost a model with all their runners, by model."""
        self._pending_models: set[str | None] = set()
        """Models to scan even if the repository is not watched."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused_by_model: dict[str, tuple[RefusedVersion, ...]] = {}
        for one in state.refused_versions:
            self._refused_by_model[one.name] = (*self._refused_by_model.get(one.name, ()), one)
        # The lock is held from the choice of versions to their commit. It also orders the calls of
        # `Refusals`, which run in worker threads.
        self._lock = asyncio.Lock()

    @property
    def state(self) -> ServingState:
        """Return the current state, which the target serves."""
        return self._state

    @property
    def _versions_by_model(self) -> VersionsByModel:
        return self._state.versions_by_model

    async def run(self, interval: float) -> None:
        """Scan every `interval` seconds for ever. With 0, scan only while a model is missing."""
        while True:
            await asyncio.sleep(interval or _MISSING_INTERVAL)
            if interval or self._state.is_empty:
                await self._scan_or_log()
            elif self._lost_counts or self._pending_models:
                await self._scan_or_log({*self._lost_counts, *self._pending_models})

    async def reload(self) -> None:
        """Scan now, and scan again after new files have had time to settle."""
        log.info("SIGHUP: scanning the repository")
        if self._update_copy:
            await self._update_copy()
        await self._scan_or_log()
        await asyncio.sleep(_SETTLE_SECONDS)
        await self._scan_or_log()

    async def _scan_or_log(self, only_names: set[str | None] | None = None) -> None:
        """Scan, and log any exception."""
        try:
            await self.scan_repository(only_names)
        except Exception:  # the next scan may succeed; served models stay
            log.exception("the repository could not be scanned")

    def count_lost_model(self, name: str | None, is_lost: bool) -> None:
        """Count a process that has lost a model with all its runners, or has the model again.

        `ModelManager.on_lost` calls this, or the supervisor for a worker.
        """
        count = self._lost_counts.get(name, 0) + (1 if is_lost else -1)
        if count > 0:
            self._lost_counts[name] = count
        else:
            self._lost_counts.pop(name, None)

    def refuse_version(self, version: ModelVersion, reason: str, lasting: bool) -> None:
        """Refuse a version that failed its trial on demand.

        Another version takes its place at the next scan. `ModelManager.on_refused` calls this, or the
        supervisor for a worker.
        """

        async def store_refusal() -> None:
            async with self._lock:
                await asyncio.to_thread(self._refusals.refuse, version, reason, lasting=lasting)
                self._pending_models.add(version.name)

        # This is a callback, which cannot wait for the lock. The event loop holds only a weak reference to
        # the task; the set keeps the task from being garbage-collected.
        task = asyncio.get_running_loop().create_task(store_refusal())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def handle_start_failure(self) -> None:
        """Replace broken versions, because a worker could not start with the served versions.

        Otherwise there would be no worker left once the last one had died. The supervisor calls this for
        every worker that fails; one replacement runs at a time.
        """
        if self._replace_task is None or self._replace_task.done():
            self._replace_task = asyncio.get_running_loop().create_task(self._replace_broken())

    async def _replace_broken(self) -> None:
        """Replace the served versions that a starting process cannot load."""
        async with self._lock:
            for name, versions in list(self._versions_by_model.items()):
                broken_flags = [await asyncio.to_thread(self._is_broken, one) for one in versions]
                if name is not None and any(broken_flags):
                    log.error(f"new workers cannot load {versions[-1].path}: another version replaces it")
                    try:
                        await self._replace_version(name)
                    except (FoveaError, OSError) as error:
                        log.error(f"no other version of model {name} can be served: {to_one_line(error)}")
            await self._choose_default()
            self._serve()

    async def _replace_version(self, name: str) -> None:
        """Serve the latest version that is not refused, or none if there is none.

        Raises `FoveaError` or `OSError`.
        """
        tried_versions: set[tuple[ModelVersion, ...]] = set()
        while True:
            choice = await self._choose_versions(name, None)
            self._record_refused(name, choice.refused_versions)
            if choice.versions in tried_versions:
                return
            tried_versions.add(choice.versions)
            try:
                await self._apply_change(name, choice.versions, force=True)
            except SwapRefused as error:
                self._log_once(name, error)
                continue
            return

    async def scan_repository(self, only_names: set[str | None] | None = None) -> None:
        """Bring the served versions up to date with the repository.

        A new version is served once it has not changed since the last scan. Versions that are gone are not
        served any more. With `only_names`, scan only these models.
        """
        async with self._lock:
            try:
                names = await asyncio.to_thread(self._chooser.list_names, set(self._versions_by_model))
            except ModelError as error:
                self._log_once(None, error)
                return
            for missing_name in self._refused_by_model.keys() - names:
                # Only the default model, which has no version yet, stays in the report.
                self._refused_by_model[missing_name] = tuple(
                    one for one in self._refused_by_model[missing_name] if not one.version
                )
            for name in names - self._unloaded_models:
                if only_names is not None and name not in only_names:
                    continue
                pinned_version = self._pinned_versions.get(name)
                if (
                    name
                    and pinned_version
                    and not (repository.find_model_folder(self._root, name) / pinned_version).is_dir()
                ):
                    del self._pinned_versions[name]
                    pinned_version = None
                try:
                    choice = await self._choose_versions(name, pinned_version)
                except ModelError as error:
                    self._log_once(name, error)
                    continue
                except OSError as error:
                    self._log_once(name, ModelError(f"its folder cannot be read: {error.strerror}"))
                    continue
                await self._reconcile(name, choice)
            await self._choose_default()
            self._serve()

    async def _reconcile(self, name: str | None, choice: VersionChoice) -> None:
        """Serve the chosen versions if they have settled and are not refused."""
        versions = choice.versions
        has_settled = self._last_versions.get(name) == versions
        self._last_versions[name] = versions
        if versions or choice.refused_versions or name in self._versions_by_model:
            self._record_refused(name, choice.refused_versions)
        if has_settled and versions == self._versions_by_model.get(name, ()):
            self._pending_models.discard(name)
        if not has_settled or versions in (
            self._versions_by_model.get(name, ()),
            self._refused_changes.get(name),
        ):
            return
        if choice.refused_versions and not versions:  # there is no replacement for the served versions
            return
        if not self._backoff.is_due(name, versions):
            return
        await self._apply_or_log(name, versions, force=choice.force)

    def _record_refused(self, name: str | None, refused_versions: tuple[RefusedVersion, ...]) -> None:
        """Keep the refusals of a model for the status report.

        While a model is served, a refused pinned version counts as missing only if it was missing at the
        start. Otherwise the refused version was only meant to replace the served version.
        """
        if name is None:
            return
        if name in self._versions_by_model:
            initial_pins = {one[:2] for one in self._refused_by_model.get(name, ()) if one.is_pinned}
            refused_versions = tuple(
                one._replace(is_pinned=one.is_pinned and one[:2] in initial_pins) for one in refused_versions
            )
        self._refused_by_model[name] = refused_versions

    def _serve(self, prepared_versions: VersionsByModel | None = None) -> None:
        """Let the target serve the current state if it has changed.

        `prepared_versions` replaces the versions of all models, after the target has prepared for it.
        """
        served_versions = self._versions_by_model if prepared_versions is None else prepared_versions
        is_empty = not served_versions and not self._unloaded_models
        refused_versions = tuple(
            one
            for name, versions in sorted(self._refused_by_model.items())
            for one in versions
            if name not in self._unloaded_models and not (one.version == "" and name in served_versions)
        )
        state = ServingState(served_versions, self._default, refused_versions, is_empty)
        if prepared_versions is not None or state != self._state:
            self._target.serve(state)
            self._state = state  # last: if that failed, the next scan tries it again

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Serve a version of a model and keep serving it. Without `version`, the repository chooses.

        `name` is None for a single file. A refused version is served all the same if the request names its
        number and its file is sound. Raises `SwapRefused`, or `ModelNotFound` when there is no such model.
        """
        async with self._hold_lock():
            try:
                if name not in await asyncio.to_thread(
                    self._chooser.list_names, set(self._versions_by_model)
                ):
                    raise ModelError(f"the repository has no model {name!r}")
                versions = await self._chooser.find_versions(name, version)
                await asyncio.sleep(_SETTLE_SECONDS)
                if versions != await self._chooser.find_versions(name, version):
                    raise SwapRefused(f"the file of model {name!r} is still being written")
            except ModelError as error:
                raise ModelNotFound(to_one_line(error)) from None
            if not versions:
                raise ModelNotFound(f"the repository has no model {name!r}")
            reasons = [await asyncio.to_thread(self._refusals.find_reason, one) for one in versions]
            if versions != self._versions_by_model.get(name, ()):
                await self._apply_change(name, versions, force=bool(version and any(reasons)))
            self._unloaded_models.discard(name)
            self._pinned_versions.pop(name, None)
            if version:
                self._pinned_versions[name] = version
            if name is not None:
                self._refused_by_model.pop(name, None)
            for one, reason in zip(versions, reasons, strict=True):
                if reason:
                    text = f"loaded by request although it had been refused: {reason}"
                    await asyncio.to_thread(self._refusals.accept, one, text)
            await self._choose_default()
            self._serve()

    async def unload(self, name: str | None) -> None:
        """Stop serving a model until it is loaded again. Raises `ModelNotFound` when it is not served."""
        async with self._hold_lock():
            if name not in self._versions_by_model:
                raise ModelNotFound(f"model {name!r} is not served")
            self._unloaded_models.add(name)
            try:
                await self._apply_change(name, ())
            except BaseException:
                self._unloaded_models.discard(name)
                raise
            await self._choose_default()
            self._serve()

    @contextlib.asynccontextmanager
    async def _hold_lock(self) -> AsyncIterator[None]:
        """Hold the lock for a change. Raises `SwapRefused` when other changes take too long."""
        try:
            async with asyncio.timeout(self._change_timeout):
                await self._lock.acquire()
        except TimeoutError:
            raise SwapRefused(
                f"other changes have taken more than {self._change_timeout:g} s; try again later"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    async def _choose_default(self) -> None:
        """Choose the default model: the named model, or else the current default or the only model."""
        if None in self._versions_by_model:
            return
        try:
            configured_default = self._configured_default or await asyncio.to_thread(
                repository.read_default_model, self._root
            )
            if configured_default and configured_default not in {
                *self._versions_by_model,
                *self._refused_by_model,
                self._default,
            }:
                file = self._root / repository.DEFAULT_MODEL_FILE
                raise ModelError(f"{file} is {configured_default!r}, which is not served")
        except ModelError as error:
            self._log_once(None, error)
            return
        self._logged_errors.pop(None, None)
        known_names = {
            *self._versions_by_model,
            *(name for name, versions in self._refused_by_model.items() if versions),
        } - self._unloaded_models
        default = configured_default or (
            self._default if self._default in known_names else repository.find_single_model(known_names)
        )
        if default != self._default:
            self._default = default
            log.info(f"the default model is now {default}" if default else "there is no default model now")

    async def _choose_versions(self, name: str | None, pinned_version: str | None) -> VersionChoice:
        """Choose the versions of a model that should be served now."""
        return await self._chooser.choose(name, pinned_version, self._versions_by_model.get(name, ()))

    async def _apply_or_log(self, name: str | None, versions: Sequence[ModelVersion], *, force: bool) -> None:
        """Make a change, or log why it is refused."""
        try:
            await self._apply_change(name, versions, force=force)
        except SwapRefused as error:
            self._log_once(name, error)

    async def _apply_change(
        self, name: str | None, versions: Sequence[ModelVersion], *, force: bool = False
    ) -> None:
        """Prepare a change and serve it. Raises `SwapRefused`; in that case nothing has changed."""
        try:
            await self._target.prepare(name, versions, force=force)
        except Interrupted as error:
            self._backoff.postpone(name, versions)
            raise SwapRefused(to_one_line(error)) from None
        except ModelError as error:
            reason = to_one_line(error)
            if name is None or len(versions) != 1:  # no version, or the failed one is unknown
                self._refused_changes[name] = versions
            else:
                await self._store_refusal(versions[0], reason, lasting=is_lasting(error))
            raise SwapRefused(reason) from None
        # Nothing may be awaited between `prepare` and `serve`: the prepared change could be aborted or
        # become outdated.
        if name is not None:
            self._refused_by_model[name] = tuple(
                one for one in self._refused_by_model.get(name, ()) if one.version and not one.is_pinned
            )
        all_versions = {**self._versions_by_model, name: tuple(versions)}
        self._serve({one: served for one, served in all_versions.items() if served})
        self._refused_changes.pop(name, None)
        self._backoff.reset(name)
        self._lost_counts.pop(name, None)
        self._logged_errors.pop(name, None)
        if self._has_limits and name is not None:
            await asyncio.to_thread(self._accept_versions, versions)
        paths = ", ".join(str(one.path) for one in versions)
        log.info(f"now serves {paths}" if versions else f"no longer serves model {name}")

    async def _store_refusal(self, version: ModelVersion, reason: str, *, lasting: bool) -> None:
        """Store and report a refusal."""
        await asyncio.to_thread(self._refusals.refuse, version, reason, lasting=lasting)
        name, path = version.name or "", self._refusals.get_verdict_path(version)
        if lasting and self._logged_errors.get(version.name) != reason:
            log.error(
                f"model {name} version {version.version} is refused from now on. To serve it anyway, load it "
                f"by request with its version number; to repeat its trial, delete {path}"
            )
        public_reason = reason.removeprefix(f"{version.path}: ")  # callers see the reason, but no local paths
        self._refused_by_model[name] = (RefusedVersion(name, version.version or "", public_reason),)
        self._serve()

    def _accept_versions(self, versions: Sequence[ModelVersion]) -> None:
        """Store the acceptance of versions that passed their comparison.

        A refusal by another service takes precedence.
        """
        for one in versions:
            if self._refusals.find_reason(one) is None and not self._refusals.is_accepted(one):
                self._refusals.accept(one, "it passed its trial")

    def _log_once(self, name: str | None, error: FoveaError) -> None:
        """Log an error once, not at every scan."""
        message = to_one_line(error)
        if self._logged_errors.get(name) != message:
            self._logged_errors[name] = message
            log.error(f"{'the repository' if name is None else f'model {name}'} stays as it is: {message}")
