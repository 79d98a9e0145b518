"""Looks at the repository again and again: what has changed there, and has settled, is to be served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from service import layout
from service.errors import FoveaError, Interrupted, ModelError, ModelNotFound, SwapRefused, one_line
from service.layout import Found, Served

log = logging.getLogger(__name__)

_SETTLE: float = 0.1
"""Seconds for which a file must stay the same when somebody asks for it to be loaded."""


class Stage(Protocol):
    """Where a change happens: in this process, or in all workers."""

    async def prepare(self, name: str | None, found: Sequence[Found]) -> None:
        """Have these versions of a model ready. Raises `ModelError`: then nothing has changed."""

    def commit(self, name: str | None) -> None:
        """Switch to them, at once."""

    def choose(self, default: str | None) -> None:
        """Which model answers from now on where a request names none."""


class Watch:
    """One repository. All methods are for the event loop."""

    def __init__(self, root: Path, served: Served, stage: Stage, *, named: str | None = None) -> None:
        """`served` is what is now; with a model `named` the repository does not say which is the default."""
        self._root = root
        self._named = named
        self._shelf = dict(served.shelf)
        self._default = served.default
        self._stage = stage
        self._seen: dict[str | None, Sequence[Found]] = dict(served.shelf)
        self._refused: dict[str | None, Sequence[Found]] = {}
        self._complaints: dict[str | None, str] = {}
        self._pinned: dict[str | None, str] = {}
        """Versions that somebody asked for."""
        self._unloaded: set[str | None] = set()
        """Models that somebody has unloaded."""
        self._one = asyncio.Lock()

    @property
    def served(self) -> Served:
        """What is served now."""
        return Served(self._shelf, self._default)

    async def run(self, every: float) -> None:
        """Look every so many seconds, for ever."""
        while True:
            await asyncio.sleep(every)
            await self._look_or_log()

    async def reload(self) -> None:
        """Look now, and again when what is new has had time to settle."""
        log.info("looks at the repository, as SIGHUP asks")
        await self._look_or_log()
        await asyncio.sleep(_SETTLE)
        await self._look_or_log()

    async def _look_or_log(self) -> None:
        try:
            await self.look()
        except Exception:  # whatever it is: the next look may succeed, and what is served stays
            log.exception("the repository could not be looked at")

    async def look(self) -> None:
        """Serve what is new and was the same at the last look; no more what is gone."""
        async with self._one:
            try:
                names = await asyncio.to_thread(self._names)
            except ModelError as error:
                self._complain(None, error)
                return
            for name in names - self._unloaded:
                pinned = self._pinned.get(name)
                if name and pinned and not (self._root / name / pinned).is_dir():
                    del self._pinned[name]
                    pinned = None
                try:
                    found = await self._find(name, pinned)
                except ModelError as error:
                    self._complain(name, error)
                    continue
                except OSError as error:
                    self._complain(name, ModelError(f"it cannot be looked at: {error.strerror}"))
                    continue
                has_settled = self._seen.get(name) == found
                self._seen[name] = found
                if has_settled and found not in (self._shelf.get(name, ()), self._refused.get(name)):
                    await self._change_or_log(name, found)
            await self._choose()

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Serve this version of a model, and go on with it; without one what the repository says. `name` is
        None of a single file.

        Raises `SwapRefused`, or `ModelNotFound` when there is no such model.
        """
        async with self._one:
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
            if found != self._shelf.get(name, ()):
                await self._change(name, found)
            self._unloaded.discard(name)
            self._pinned.pop(name, None)
            if version:
                self._pinned[name] = version
            await self._choose()

    async def unload(self, name: str | None) -> None:
        """Serve a model no more, until it is loaded. Raises `ModelNotFound` when it is not served."""
        async with self._one:
            if name not in self._shelf:
                raise ModelNotFound(f"model {name!r} is not served")
            await self._change(name, ())
            self._unloaded.add(name)
            await self._choose()

    async def _choose(self) -> None:
        """The default is the model that is named so; without a name it stays, or is the only one."""
        if None in self._shelf:
            return
        try:
            named = self._named or await asyncio.to_thread(layout.read_default, self._root)
            if named and named not in {*self._shelf, self._default}:
                raise ModelError(f"{self._root / layout.DEFAULT_FILE} is {named!r}, which is not served")
        except ModelError as error:
            self._complain(None, error)
            return
        self._complaints.pop(None, None)
        default = named or (self._default if self._default in self._shelf else layout.only(self._shelf))
        if default != self._default:
            self._default = default
            self._stage.choose(default)
            log.info(f"the default model is {default} from now on" if default else "no model is the default")

    def _names(self) -> set[str | None]:
        """Of what is there and of what was. An empty repository is one that is not there: nothing goes."""
        if self._root.is_file() or None in self._shelf:
            return {None}
        names = layout.names(self._root)
        if not names:
            raise ModelError(f"the repository {self._root} is empty; what is served stays")
        return {*names, *self._shelf}

    async def _find(self, name: str | None, version: str | None) -> tuple[Found, ...]:
        if name is not None and not (self._root / name).is_dir():
            return ()
        return await asyncio.to_thread(layout.find_model, self._root, name, version)

    async def _change_or_log(self, name: str | None, found: Sequence[Found]) -> None:
        try:
            await self._change(name, found)
        except SwapRefused as error:
            self._complain(name, error)

    async def _change(self, name: str | None, found: Sequence[Found]) -> None:
        """Raises `SwapRefused`: then nothing has changed."""
        try:
            await self._stage.prepare(name, found)
        except ModelError as error:
            if not isinstance(error, Interrupted):
                self._refused[name] = found
            raise SwapRefused(one_line(error)) from None
        self._stage.commit(name)
        self._refused.pop(name, None)
        self._complaints.pop(name, None)
        if found:
            self._shelf[name] = tuple(found)
        else:
            self._shelf.pop(name, None)
        served = ", ".join(str(one.path) for one in found) or f"model {name} no more"
        log.info(f"now serves {served}")

    def _complain(self, name: str | None, error: FoveaError) -> None:
        """Once, and not at every look."""
        said = one_line(error)
        if self._complaints.get(name) != said:
            self._complaints[name] = said
            log.error(f"{'the repository' if name is None else f'model {name}'} stays as it is: {said}")
