"""The watcher of the keys file: new keys are accepted without a restart, and without a failed request."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Final

from fovea.service.access.access_control import AccessControl
from fovea.service.access.keys_file import KeysFileError, parse_keys, read_content
from fovea.service.errors import StartError

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
"""Time in seconds between two looks at the file. A change counts after the second look that finds it, so that
a file that is written in place is complete."""


class KeyWatcher:
    """The watcher of one keys file, which gives its keys to an `AccessControl`.

    The file may be replaced by a rename, and may be a link whose target changes, as in the secrets of
    Kubernetes. Nothing that happens to the file changes the keys until the whole file is valid again.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises `StartError`, because a service must not start without its keys."""
        self._path = path
        self._signature = _read_signature(path)
        self._pending_signature = self._signature
        try:
            self._content = read_content(path)
            keys = parse_keys(self._content)
        except KeysFileError as error:
            raise StartError(f"FOVEA_KEYS is {str(path)!r}: {error}") from None
        self.access = AccessControl(keys)
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
        # Also for a file that is not valid, so that the log has one line for it.
        self._signature = signature
        try:
            content = await asyncio.to_thread(read_content, self._path)
            if content == self._content:
                return
            keys = parse_keys(content)
        except KeysFileError as error:
            log.error(
                f"the keys file {self._path} cannot be used, and the keys from before stay in force: {error}"
            )
            return
        self._content = content
        self.access.replace_keys(keys)
        log.info(f"the keys file has changed; it has {len(keys)} keys now")


def _read_signature(path: Path) -> tuple[int, ...]:
    """Return numbers that change with the file at a path; none if there is no file."""
    try:
        status = os.stat(path)  # follows links  # noqa: PTH116
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
