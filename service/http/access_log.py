"""The log: JSON, a line each, or readable in a terminal; and the line that every request gets."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import logging.handlers
import os
import queue
import re
import select
import sys
import threading
import time
from collections import defaultdict
from typing import Any, Final, Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor

from fovea.service.http.request_record import Record

_WAITING: Final = 1000
"""Lines that wait to be written at most; more are lost."""

_FAREWELL: Final = 1.0
"""Seconds for the last lines to be written at the end of the process."""

_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
"""W3C Trace Context, level 1, section 3.2; of a later version the beginning."""


# --- the access log ------------------------------------------------------------------------------


class AccessLog:
    """Tells of each request. When there are too many, of as many a second: of each class of status."""

    def __init__(self, each_second: int) -> None:
        self._log = structlog.stdlib.get_logger("fovea.access")
        self._limits: defaultdict[int, _Limit] = defaultdict(lambda: _Limit(each_second))
        """By the status's first digit: callers' mistakes must not hide the service's."""

    def write(self, record: Record, seconds: float, trace_id: str) -> None:
        """The line of a request that is over. Those that no model took part in (probes, scrapes, pages) and
        that got what they wanted are told of at level `debug`, those that the service failed at `warning`."""
        level = logging.WARNING if record.status >= 500 else logging.INFO
        if not (record.reason or record.model):
            level = logging.DEBUG
        if not self._log.isEnabledFor(level):
            return
        limit = self._limits[record.status // 100]
        if limit.allows():
            self._log.log(level, "request", **_fields(record, seconds, trace_id), **limit.left_out())


class _Limit:
    """So many in a second, and a count of those beyond."""

    def __init__(self, each_second: int) -> None:
        self._most = each_second
        self._second = self._count = self._beyond = 0

    def allows(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        if self._count <= self._most:
            return True
        self._beyond += 1
        return False

    def left_out(self) -> dict[str, int]:
        """How many since it was last asked, if there were any."""
        beyond, self._beyond = self._beyond, 0
        return {"left_out": beyond} if beyond else {}


def _fields(record: Record, seconds: float, trace_id: str) -> dict[str, Any]:
    """What a line says, by the names of the metrics and of their labels. No body, no query, no header but the
    ids and the client's address as a trusted proxy tells it."""
    longest = record.longest()
    fields = {
        "request_id": record.request_id,
        "trace_id": trace_id,
        "client": record.client,
        "peer": record.peer if record.peer != record.client else "",
        "method": record.method,
        "dialect": record.dialect.name,
        "route": record.route,
        "model": record.model,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "images": record.images,
        "image_errors": record.image_errors,
        "warnings": record.warnings,
        "batch_images": longest["inference"].batch if "inference" in longest else 0,
        "request_seconds": round(seconds, 6),
        "stage_seconds": {name: round(stage.seconds, 6) for name, stage in longest.items()},
    }
    return {name: value for name, value in fields.items() if value or name in _ALWAYS}


_ALWAYS: Final = ("route", "status")
"""Fields that are told even where they say nothing."""


def trace_id_of(traceparent: bytes) -> str:
    """The trace that a caller's header names; empty where it is no such header."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1].decode() if found and found[1].strip(b"0") else ""


# --- writing -------------------------------------------------------------------------------------


def set_up(
    level: str, style: Literal["auto", "json", "text"], stream: Literal["stderr", "stdout"] = "stderr"
) -> None:
    """Send this process's log to a standard stream: as text if that is a terminal, unless told otherwise."""
    file = sys.stdout if stream == "stdout" else sys.stderr
    is_terminal = file is not None and file.isatty()
    as_text = style == "text" or (style == "auto" and is_terminal)
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_text:
        plain = structlog.dev.plain_traceback  # others show what variables hold: images
        renderers += [
            _flat,
            structlog.dev.ConsoleRenderer(
                colors=is_terminal, sort_keys=False, pad_event_to=0, exception_formatter=plain
            ),
        ]
    else:
        renderers += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    structlog.configure(
        [*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    foreign: list[Processor] = [structlog.stdlib.add_logger_name, *shared]
    formatter = structlog.stdlib.ProcessorFormatter(processors=renderers, foreign_pre_chain=foreign)
    logging.basicConfig(level=level.upper(), handlers=[_Writer(formatter, _DESCRIPTORS[stream])], force=True)


def _json(event: EventDict, **_: Any) -> str:
    """The time, the level and the event come first."""
    first = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    ordered = {**first, **event}
    try:
        return orjson.dumps(ordered, default=repr).decode()
    except TypeError:  # a file's name that is no text
        return json.dumps(ordered, default=repr)


def _flat(_logger: Any, _name: str, event: EventDict) -> EventDict:
    """For people: `decode=0.2ms` in place of an object."""
    for name, seconds in event.pop("stage_seconds", {}).items():
        event[name] = f"{1000 * seconds:.1f}ms"
    return event


_DESCRIPTORS: Final = {"stdout": 1, "stderr": 2}


class _Writer(logging.Handler):
    """Hands each line to a thread that writes it: a write to a pipe that nobody reads never returns."""

    def __init__(self, formatter: logging.Formatter, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.setFormatter(formatter)
        self._lines: queue.Queue[bytes] = queue.Queue(_WAITING)
        threading.Thread(target=self._write, name="log", daemon=True).start()
        atexit.register(self._finish)

    def emit(self, record: logging.LogRecord) -> None:
        """A full queue loses the line, and an error in making it is told as `logging` tells it."""
        try:
            self._lines.put_nowait((self.format(record) + "\n").encode(errors="replace"))
        except queue.Full:
            pass
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError):  # nobody is there to be told
                while line:
                    try:
                        line = line[os.write(self._descriptor, line) :]
                    except BlockingIOError:  # whoever shares it has made it so
                        select.select([], [self._descriptor], [])
            self._lines.task_done()

    def _finish(self) -> None:
        limit = time.monotonic() + _FAREWELL
        while self._lines.unfinished_tasks and time.monotonic() < limit:
            time.sleep(0.001)
