"""Models by URI: the service serves a local copy of a repository in an object store.

The copy is made before the start and updated every FOVEA_STORE_POLL seconds. The watcher sees the copy as any
other repository, so trial, swap, rollback and refusals are the same. If the store cannot be reached, the copy
is served as it is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import fovea
from fovea.service.environment import MODELS_SETTING, name_variable
from fovea.service.errors import StartError, to_one_line
from fovea.service.observability.metrics import ProcessMetrics
from fovea.service.remote.store_uri import StoreError, find_copy_folder
from fovea.service.rollout.store_copy import create_private_folder, has_complete_copy, read_index
from fovea.service.setting_values import check_path
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
"""Number of attempts at the start, before the copy of an earlier start is served or the start fails."""

_UPDATE_SECONDS: Final = 900.0
"""Time limit of one update, in seconds."""

_CHECK_SECONDS: Final = 60.0
"""Time limit of the update at a start that has a copy already. The rest is copied while that is served."""

_RETRY_SECONDS: float = 1.0
"""Time in seconds between the first two attempts; it doubles."""


def fetch_models(settings: Settings) -> Settings:
    """Copy the store's models, and return the settings with the folder or file to serve.

    Does nothing without a store. Blocks. Raises `StartError` if the store cannot be read, and no earlier
    start has left a copy.
    """
    uri = settings.store_uri
    if uri is None:
        return settings
    name = name_variable(MODELS_SETTING, uri)
    folder = find_copy_folder(uri, settings.model_cache)
    try:
        create_private_folder(folder)
    except (StoreError, OSError) as failure:
        raise StartError(f"{name} is {uri!r}, which cannot be copied: {to_one_line(failure)}") from None
    has_copy = has_complete_copy(uri, folder)
    attempts, seconds_limit = (1, _CHECK_SECONDS) if has_copy else (_ATTEMPTS, _UPDATE_SECONDS)
    for attempt in range(attempts):
        if attempt:
            time.sleep(_RETRY_SECONDS * 2 ** (attempt - 1))
        started = time.monotonic()
        result = _run_update(uri, folder, seconds_limit)
        error = result["error"]
        for warning in result.get("warnings", ()):
            log.warning(warning)
        if error is None:
            seconds = time.monotonic() - started
            log.info(f"{uri}: {len(result['copied'])} of {result['total']} files copied in {seconds:.1f} s")
            break
        log.warning(f"attempt {attempt + 1} of {attempts} to read {uri}: {error}")
    if error is not None:
        if not has_copy:
            raise StartError(f"{name} is {uri!r}, and there is no copy of an earlier start: {error}")
        log.error(f"{uri} cannot be read, so the copy of an earlier start is served: {error}")
    return settings.model_copy(update={"models": check_path(folder)})


class StoreSync:
    """Updates of the copy while the service runs. Every method must be called on the event loop."""

    def __init__(self, settings: Settings, metrics: ProcessMetrics) -> None:
        """Take the store of the settings; without one, nothing happens."""
        self._uri = settings.store_uri
        self._folder = find_copy_folder(self._uri, settings.model_cache) if self._uri else Path()
        self._interval = settings.store_poll
        self._metrics = metrics
        self._last_error: str | None = None
        self._last_warnings: list[str] = []
        self._lock = asyncio.Lock()
        self.awaited_pids: set[int] = set()
        """Process ids of the children that this object waits for."""
        if self._uri:
            metrics.store_updated_timestamp_seconds.set(read_index(self._folder).updated)

    async def run(self) -> None:
        """Update the copy every `FOVEA_STORE_POLL` seconds for ever; 0: never."""
        while self._uri and self._interval:
            await asyncio.sleep(self._interval)
            try:
                await self.update()
            except Exception:  # the next update may succeed; served models stay
                log.exception("the copy of the store could not be updated")

    async def update(self) -> None:
        """Update the copy now. A failure is logged once and counted."""
        if not self._uri:
            return
        async with self._lock:
            try:
                result = await self._run_update(self._uri)
            except OSError as failure:  # no process or no descriptor can be had
                result = {"error": to_one_line(failure)}
            error = result["error"]
            self._metrics.store_updates.labels("failed" if error else "ok").inc()
            if error:
                if not self._last_error:  # the texts of one cause may differ, by the number of a request
                    log.error(f"{self._uri} cannot be read; the copy is served as it is: {error}")
            else:
                self._metrics.store_updated_timestamp_seconds.set(time.time())
                if self._last_error:
                    log.info(f"{self._uri} can be read again")
                if result["copied"] or result["removed"]:
                    log.info(
                        f"{self._uri}: copied {', '.join(result['copied']) or 'nothing'}; "
                        f"removed {', '.join(result['removed']) or 'nothing'}"
                    )
            self._last_error = error
            warnings = result.get("warnings", [])
            if warnings != self._last_warnings:
                for warning in warnings:
                    log.warning(warning)
            self._last_warnings = warnings

    async def _run_update(self, uri: str) -> Mapping[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *_build_command(uri, self._folder),
            env=_build_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.awaited_pids.add(process.pid)
        try:
            assert process.stdout and process.stderr  # noqa: S101 - they are pipes
            async with asyncio.timeout(_UPDATE_SECONDS):
                output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
            return _parse_result(output, errors)
        except TimeoutError:
            return {"error": f"no answer within {_UPDATE_SECONDS:g} s"}
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self.awaited_pids.discard(process.pid)


def _run_update(uri: str, folder: Path, seconds: float) -> Mapping[str, Any]:
    # The child must not see the end of its standard input before the service's end.
    with subprocess.Popen(  # noqa: S603 - our own module
        _build_command(uri, folder),
        env=_build_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # noqa: S101 - they are pipes
        stdin, process.stdin = process.stdin, None  # `communicate` would close it
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {seconds:g} s"}
        finally:
            process.kill()
            stdin.close()
    return _parse_result(output, errors)


def _build_command(uri: str, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "fovea.service.rollout.store_copy_process", uri, str(folder)]


def _build_environment() -> dict[str, str]:
    python_path = os.pathsep.join(
        filter(None, (str(Path(fovea.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    )
    return {**os.environ, "PYTHONPATH": python_path}


def _parse_result(output: bytes, errors: bytes) -> Mapping[str, Any]:
    try:
        result = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        lines = errors.decode(errors="replace").strip().splitlines()
        return {"error": f"the process that reads the store has died: {lines[-1] if lines else 'killed'}"}
    return dict(result)
