"""Verdicts on model versions that must outlive the process: which were refused, why, and which were let in.

A verdict lies in a small JSON file: `trial.json` beside the model file, or `<state>/<name>/<version>.json`
where FOVEA_STATE names a folder. It holds the SHA-256 digest of the model file, so that it ends with the
file's content. Whoever deletes it has the version tried again. Services that share the repository, or the
state folder, share the verdicts. Where neither can be written, a verdict lasts as long as the process, and
the start tries again.
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

from fovea.service.artifact.model_file import stamp_of
from fovea.service.artifact.repository import Found
from fovea.service.errors import ModelError

log = logging.getLogger(__name__)

RECORD: Final = "trial.json"

_MOST_BYTES: Final = 64 << 10
"""Of a verdict's file: what is longer is none of ours."""

_MOST_MODEL_BYTES: Final = (1 << 31) - 1
"""Protobuf's limit: a file with more is no model, which is found out anew in less time than its digest
takes."""

_DIGESTS: Final = 1000
"""Files whose digests are remembered: a digest takes a second for each 500 MB or so."""


_AGAIN: Final = (30.0, 600.0)
"""Seconds after which a version is tried again that the machine may have been to blame for: at first, doubled
each time, and at most."""


class _Entry(NamedTuple):
    """A refusal of this process."""

    reason: str
    is_kept: bool
    """It has a file, and ends when somebody deletes that."""
    seconds: float = math.inf
    """For which it holds."""
    until: float = math.inf
    """When it ends by itself, on the monotonic clock."""


class Refusals:
    """All verdicts. Every method reads files, and may be called from any thread, by one at a time."""

    def __init__(self, state: Path | None = None) -> None:
        """`state` is the folder of the verdicts, where they do not lie beside the models."""
        self._state = state
        self._entries: dict[tuple[Path, tuple[int, ...]], _Entry] = {}
        self._unreadable: set[Path] = set()
        self._digests: dict[tuple[Path, tuple[int, ...]], str] = {}

    def reason(self, found: Found) -> str | None:
        """Return why a version is not to be served; None where nothing speaks against it."""
        record = self._read(found)
        if record is not None:
            return None if record["accepted"] else str(record["reason"])
        entry = self._entries.get(_key(found))
        if entry is None:
            return None
        if entry.is_kept:  # its file was deleted: it is to be tried again
            del self._entries[_key(found)]
            return None
        return entry.reason if time.monotonic() < entry.until else None

    def is_accepted(self, found: Found) -> bool:
        """Whether a version was let in before, by its trial or by somebody's word."""
        record = self._read(found)
        return record is not None and record["accepted"]

    def refuse(self, found: Found, reason: str, *, lasting: bool) -> None:
        """Remember that a version is not to be served until its file changes; beyond this process if
        `lasting`, else for a while: the machine may have been to blame."""
        reason = reason.removeprefix(f"{found.path}: ")  # callers are shown it, and no path of this machine
        is_kept = lasting and self._write(found, accepted=False, reason=reason)
        if lasting:
            self._entries[_key(found)] = _Entry(reason, is_kept)
            return
        before = self._entries.get(_key(found))
        shortest, longest = _AGAIN
        seconds = min(longest, 2 * before.seconds) if before else shortest
        self._entries[_key(found)] = _Entry(reason, False, seconds, time.monotonic() + seconds)

    def accept(self, found: Found, reason: str) -> None:
        """Remember that a version may be served, whatever a comparison says."""
        self._entries.pop(_key(found), None)
        self._write(found, accepted=True, reason=reason)

    def path(self, found: Found) -> Path | None:
        """Return where the verdict on a version lies; None for a single file, which is no version of
        anything."""
        if found.name is None or found.version is None:
            return None
        if self._state:
            return self._state / found.name / f"{found.version}.json"
        return found.path.with_name(RECORD)

    def _read(self, found: Found) -> dict[str, Any] | None:
        """The verdict on this very file, if there is one."""
        path = self.path(found)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                record = json.loads(file.read(_MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if path not in self._unreadable:  # once, and not at each look
                self._unreadable.add(path)
                log.warning("%s cannot be read, and is passed over: %s", path, error)
            return None
        known = isinstance(record, dict) and {"sha256", "accepted", "reason"} <= record.keys()
        if not known or record["sha256"] != self._digest(found):
            return None
        return dict(record)

    def _write(self, found: Found, *, accepted: bool, reason: str) -> bool:
        """Whether it could be: renamed into its place, so that nobody reads half of it."""
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

    def _digest(self, found: Found) -> str | None:
        """SHA-256 of a model file; None when it is not the one that was found any more, or too large for
        one."""
        known = self._digests.get(_key(found))
        if known:
            return known
        try:
            with found.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MOST_MODEL_BYTES:
                    return None
                if stamp_of(file.fileno()) != found.stamp:
                    return None
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if stamp_of(file.fileno()) != found.stamp:
                    return None
        except (OSError, ModelError):
            return None
        if len(self._digests) >= _DIGESTS:
            del self._digests[next(iter(self._digests))]
        self._digests[_key(found)] = digest
        return digest


def _key(found: Found) -> tuple[Path, tuple[int, ...]]:
    return found.path, found.stamp
