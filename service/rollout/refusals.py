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

VERDICT_FILE: Final = "trial.json"

_MAX_VERDICT_BYTES: Final = 64 << 10
"""Maximum size of a verdict file in bytes. A longer file is not a verdict."""

_MAX_MODEL_BYTES: Final = (1 << 31) - 1
"""Maximum size of a model file in bytes, the limit of Protobuf. A larger file is no model. Finding that out
again takes less time than computing its digest."""

_MAX_DIGESTS: Final = 1000
"""Maximum number of digests in the cache. Computing a digest takes about a second per 500 MB."""


_RETRY_SECONDS: Final = (30.0, 600.0)
"""Time in seconds before a refused version is tried again, if the machine may have been the cause: the first
delay, which doubles each time, and the maximum."""


class _Refusal(NamedTuple):
    """Refusal by this process."""

    reason: str
    is_stored: bool
    """True if the refusal has a verdict file. The refusal then ends when somebody deletes the file."""
    seconds: float = math.inf
    """Duration of the refusal in seconds."""
    ends_at: float = math.inf
    """End of the refusal on the monotonic clock in seconds."""


class Refusals:
    """Store of all verdicts.

    Every method reads files and may run in any thread, but only in one at a time. `Watcher` calls the methods
    in worker threads while it holds its lock.
    """

    def __init__(self, state: Path | None = None) -> None:
        """Set the folder for verdicts. Without `state`, verdicts are stored beside the models."""
        self._state = state
        self._entries: dict[tuple[Path, tuple[int, ...]], _Refusal] = {}
        self._unreadable: set[Path] = set()
        self._digests: dict[tuple[Path, tuple[int, ...]], str] = {}

    def find_reason(self, version: ModelVersion) -> str | None:
        """Return the reason for refusing a version, or None if it may be served."""
        verdict = self._read_verdict(version)
        if verdict is not None:
            return None if verdict["accepted"] else str(verdict["reason"])
        entry = self._entries.get(_get_version_key(version))
        if entry is None:
            return None
        if entry.is_stored:  # the verdict file was deleted: try the version again
            del self._entries[_get_version_key(version)]
            return None
        return entry.reason if time.monotonic() < entry.ends_at else None

    def is_accepted(self, version: ModelVersion) -> bool:
        """Return whether a version was accepted before, by a trial or by request."""
        verdict = self._read_verdict(version)
        return verdict is not None and verdict["accepted"]

    def refuse(self, version: ModelVersion, reason: str, *, lasting: bool) -> None:
        """Refuse a version until its file changes.

        A `lasting` refusal outlives this process. Another refusal holds for a limited time, because the
        machine may have been the cause.
        """
        reason = reason.removeprefix(f"{version.path}: ")  # callers see the reason, but no local paths
        is_stored = lasting and self._write_verdict(version, accepted=False, reason=reason)
        if lasting:
            self._entries[_get_version_key(version)] = _Refusal(reason, is_stored)
            return
        previous = self._entries.get(_get_version_key(version))
        shortest, longest = _RETRY_SECONDS
        seconds = min(longest, 2 * previous.seconds) if previous else shortest
        self._entries[_get_version_key(version)] = _Refusal(
            reason, False, seconds, time.monotonic() + seconds
        )

    def accept(self, version: ModelVersion, reason: str) -> None:
        """Accept a version, whatever a comparison says."""
        self._entries.pop(_get_version_key(version), None)
        self._write_verdict(version, accepted=True, reason=reason)

    def get_verdict_path(self, version: ModelVersion) -> Path | None:
        """Return the path of the verdict on a version, or None for a single file, which has no version."""
        if version.name is None or version.version is None:
            return None
        if self._state:
            return self._state / version.name / f"{version.version}.json"
        return version.path.with_name(VERDICT_FILE)

    def _read_verdict(self, version: ModelVersion) -> dict[str, Any] | None:
        """Return the verdict on exactly this file, or None if there is no verdict."""
        path = self.get_verdict_path(version)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                verdict = json.loads(file.read(_MAX_VERDICT_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if path not in self._unreadable:  # log once, not at every scan
                self._unreadable.add(path)
                log.warning("the verdict %s cannot be read and is ignored: %s", path, error)
            return None
        match verdict:  # the file may hold anything
            case {"sha256": str(digest), "accepted": bool(), "reason": str()}:
                return dict(verdict) if digest == self._compute_digest(version) else None
        return None

    def _write_verdict(self, version: ModelVersion, *, accepted: bool, reason: str) -> bool:
        """Write a verdict and return whether that was possible.

        The file is renamed into place, so that no reader sees half of it.
        """
        path = self.get_verdict_path(version)
        if path is None:
            return False
        digest = self._compute_digest(version)
        if digest is None:
            return False
        verdict = {
            "sha256": digest,
            "accepted": accepted,
            "reason": reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            if self._state:
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary_path = tempfile.mkstemp(prefix=".trial-", dir=path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(verdict, file, indent=1)
                os.chmod(temporary_path, 0o644)  # noqa: PTH101 - services of other users read it
                os.replace(temporary_path, path)  # noqa: PTH105 - both paths are strings
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary_path)  # noqa: PTH108
                raise
        except OSError as error:
            log.warning(
                "the verdict on %s cannot be written to %s (%s) and ends with this process; set FOVEA_STATE "
                "to a writable folder",
                version.path,
                path,
                error.strerror,
            )
            return False
        return True

    def _compute_digest(self, version: ModelVersion) -> str | None:
        """Return the SHA-256 digest of a model file, or None if the file has changed or is too large."""
        cached_digest = self._digests.get(_get_version_key(version))
        if cached_digest:
            return cached_digest
        try:
            with version.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MAX_MODEL_BYTES:
                    return None
                if fingerprint_of(file.fileno()) != version.fingerprint:
                    return None
                # Check the fingerprint before and after, because the file may be written in between.
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if fingerprint_of(file.fileno()) != version.fingerprint:
                    return None
        except (OSError, ModelError):
            return None
        if len(self._digests) >= _MAX_DIGESTS:
            del self._digests[next(iter(self._digests))]
        self._digests[_get_version_key(version)] = digest
        return digest


def _get_version_key(version: ModelVersion) -> tuple[Path, tuple[int, ...]]:
    """Return the key of a version: the path and the fingerprint of its file."""
    return version.path, version.fingerprint
