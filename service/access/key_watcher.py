"""The watcher of the keys file: new keys are accepted without a restart, and without a failed request."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from fovea.service.access.access_control import AccessControl
from fovea.service.access.keys_file import KeysFileError, parse_keys, read_content
from fovea.service.access.refusal_pace import RefusalPace
from fovea.service.errors import StartError

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
"""Time in seconds between two looks at the file. A change counts after the second look that finds it, so that
a file that is written in place is complete."""


_Signature: TypeAlias = tuple[int, ...]


class KeyWatcher:
    """The watcher of one keys file, which gives its keys to an `AccessControl`.

    The file may be replaced by a rename, and may be a link whose target changes, as in the secrets of
    Kubernetes. Nothing that happens to the file changes the keys until the whole file is valid again.
    """

    def __init__(
        self,
        path: Path,
        content: bytes | None = None,
        pace: RefusalPace | None = None,
        *,
        on_reload: Callable[[bool], None] = lambda is_valid: None,
    ) -> None:
        """Read the file. Raises `StartError`, because a service must not start without its keys.

        A worker starts with the `content` that is in force in its supervisor. The first looks then read the
        file, which may be broken now. `pace` is that of `AccessControl`. `on_reload` is called on the event
        loop for each new state of the file, with whether it is valid.
        """
        self._path = path
        self._on_reload = on_reload
        self._signature = _read_signature(path) if content is None else None
        """Signature of the file when it was last read; None if it has not been read."""
        self._pending_signature = self._signature
        self._reported_problem: tuple[_Signature, str] | None = None
        """Problem of the file in its present state that the log has already."""
        try:
            self.content = read_content(path) if content is None else content
            """Content of the file from which the keys in force are."""
            keys = parse_keys(self.content)
        except KeysFileError as error:
            raise StartError(f"FOVEA_KEYS is {str(path)!r}: {error}") from None
        self.access = AccessControl(keys, pace=pace)
        if not keys:
            log.warning("the keys file has no keys: every request that needs a key is refused")

    async def run(self, interval: float = POLL_SECONDS) -> None:
        """Look at the file every `interval` seconds for ever."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self.poll()
            except Exception:  # the next look may succeed; the keys stay
                log.exception("the keys file could not be watched")

    async def poll(self) -> None:
        """Look at the file, and accept its keys if it has changed and has not changed since the last look."""
        signature = await asyncio.to_thread(_read_signature, self._path)
        is_settled, self._pending_signature = signature == self._pending_signature, signature
        if signature == self._signature or not is_settled:
            return
        try:
            content = await asyncio.to_thread(read_content, self._path)
            if await asyncio.to_thread(_read_signature, self._path) != signature:
                return  # it was being written: a part of it may be valid, too
            # Only now: if the file cannot be read, as without free descriptors, the next look tries again.
            self._signature = signature
            if content == self.content:
                return
            keys = parse_keys(content)
        except KeysFileError as error:
            self._report_problem(signature, str(error))
            return
        self.content = content
        self.access.replace_keys(keys)
        self._on_reload(True)
        log.info(f"the keys file has changed; it has {len(keys)} keys now")

    def _report_problem(self, signature: _Signature, problem: str) -> None:
        """Log a problem of the file, once for each state of the file."""
        if self._reported_problem != (signature, problem):
            self._reported_problem = signature, problem
            self._on_reload(False)
            log.error(
                "the keys file %s cannot be used, and the keys from before stay in force: %s",
                self._path,
                problem,
            )


def _read_signature(path: Path) -> _Signature:
    """Return numbers that change with the file at a path; none if there is no file."""
    try:
        status = os.stat(path)  # follows links  # noqa: PTH116
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
