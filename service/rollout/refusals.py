"""Verdicts on model versions that outlive the process: refused or accepted, and the reason.

A verdict is a small JSON file: `trial.json` beside the model file, or `<state>/<name>/<version>.json` if
FOVEA_STATE names a folder. The file holds the SHA-256 digest of the model file, so that the verdict ends when
the model file changes. Delete the verdict to have the version tried again. Services that share the repository
or the state folder share the verdicts. If neither place is writable, a verdict lasts as long as the process,
and the next start tries the version again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import ModelError

log = logging.getLogger(__name__)

RECORD: Final = "trial.json"

_MOST_BYTES: Final = 64 << 10
"""Maximum size of a verdict file in bytes. A longer file is not a verdict."""

_MOST_MODEL_BYTES: Final = (1 << 31) - 1
"""Maximum size of a model file in bytes, the limit of Protobuf. A larger file is no model. Finding that out
again takes less time than computing its digest."""

_DIGESTS: Final = 1000
"""Maximum number of digests in the cache. Computing a digest takes about a second per 500 MB."""


_AGAIN: Final = (30.0, 600.0)
"""Time in seconds before a version is tried again that the machine may have failed: the first delay, which
doubles each time, and the maximum."""


class _Entry(NamedTuple):
    """Refusal by this process."""

    reason: str
    is_kept: bool
    """True if the refusal has a verdict file. The refusal then ends when somebody deletes the file."""
    seconds: float = math.inf
    """Duration of the refusal in seconds."""
    until: float = math.inf
    """End of the refusal on the monotonic clock in seconds."""


class Refusals:
    """Store of all verdicts.

    Every method reads files and may run in any thread, but only in one at a time.
    """

    def __init__(self, state: Path | None = None) -> None:
        """Set the folder for verdicts. Without `state`, verdicts are stored beside the models."""
        self._state = state
        self._entries: dict[tuple[Path, tuple[int, ...]], _Entry] = {}
        self._unreadable: set[Path] = set()
        self._digests: dict[tuple[Path, tuple[int, ...]], str] = {}

    def reason(self, found: ModelVersion) -> str | None:
        """Return the reason for refusing a version, or None if it may be served."""
        record = self._read(found)
        if record is not None:
            return None if record["accepted"] else str(record["reason"])
        entry = self._entries.get(_key(found))
        if entry is None:
            return None
        if entry.is_kept:  # the verdict file was deleted: try the version again
            del self._entries[_key(found)]
            return None
        return entry.reason if time.monotonic() < entry.until else None

    def is_accepted(self, found: ModelVersion) -> bool:
        """Return whether a version was accepted before, by a trial or by request."""
        record = self._read(found)
        return record is not None and record["accepted"]

    def refuse(self, found: ModelVersion, reason: str, *, lasting: bool) -> None:
        """Refuse a version until its file changes.

        A `lasting` refusal outlives this process. Another refusal holds for a limited time, because the
        machine may have been the cause.
        """
        reason = reason.removeprefix(f"{found.path}: ")  # callers see the reason, but no local paths
        is_kept = lasting and self._write(found, accepted=False, reason=reason)
        if lasting:
            self._entries[_key(found)] = _Entry(reason, is_kept)
            return
        before = self._entries.get(_key(found))
        shortest, longest = _AGAIN
        seconds = min(longest, 2 * before.seconds) if before else shortest
        self._entries[_key(found)] = _Entry(reason, False, seconds, time.monotonic() + seconds)

    def accept(self, found: ModelVersion, reason: str) -> None:
        """Accept a version, whatever a comparison says."""
        self._entries.pop(_key(found), None)
        self._write(found, accepted=True, reason=reason)

    def path(self, found: ModelVersion) -> Path | None:
        """Return the path of the verdict on a version, or None for a single file, which has no version."""
        if found.name is None or found.version is None:
            return None
        if self._state:
            return self._state / found.name / f"{found.version}.json"
        return found.path.with_name(RECORD)

    def _read(self, found: ModelVersion) -> dict[str, Any] | None:
        """Return the verdict on exactly this file, or None if there is no verdict."""
        path = self.path(found)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                record = json.loads(file.read(_MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if path not in self._unreadable:  # log once, not at every look
                self._unreadable.add(path)
                log.warning("%s cannot be read, and is passed over: %s", path, error)
            return None
        match record:  # the file may hold anything
            case {"sha256": str(digest), "accepted": bool(), "reason": str()}:
                return dict(record) if digest == self._digest(found) else None
        return None

    def _write(self, found: ModelVersion, *, accepted: bool, reason: str) -> bool:
        """Write a verdict and return whether that was possible.

        The file is renamed into place, so that no reader sees half of it.
        """
        path = self.path(found)
        if path is None:
            return False
        digest = self._digest(found)
        if digest is None:
            return False
        record = {
            "sha256": digest,
            "accepted": accepted,
            "reason": reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            if self._state:
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(prefix=".trial-", dir=path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(record, file, indent=1)
                os.chmod(fresh, 0o644)  # noqa: PTH101 - others who share the repository read it
                os.replace(fresh, path)  # noqa: PTH105 - of strings
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(fresh)  # noqa: PTH108
                raise
        except OSError as error:
            log.warning(
                "the verdict on %s cannot be kept at %s (%s), and ends with this process; name a folder that "
                "can be written with FOVEA_STATE",
                found.path,
                path,
                error.strerror,
            )
            return False
        return True

    def _digest(self, found: ModelVersion) -> str | None:
        """Return the SHA-256 digest of a model file, or None if the file has changed or is too large."""
        known = self._digests.get(_key(found))
        if known:
            return known
        try:
            with found.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MOST_MODEL_BYTES:
                    return None
                if fingerprint_of(file.fileno()) != found.fingerprint:
                    return None
                # The stamp is checked before and after, because the file may be written meanwhile.
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if fingerprint_of(file.fileno()) != found.fingerprint:
                    return None
        except (OSError, ModelError):
            return None
        if len(self._digests) >= _DIGESTS:
            del self._digests[next(iter(self._digests))]
        self._digests[_key(found)] = digest
        return digest


def _key(found: ModelVersion) -> tuple[Path, tuple[int, ...]]:
    """Return the key of a version: the path and the stamp of its file."""
    return found.path, found.fingerprint
