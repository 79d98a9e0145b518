"""Logging setup and the access log, which has one line per request.

A log line is JSON, or readable text in a terminal.
"""

from __future__ import annotations

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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor

from fovea.service.http.request_record import RequestRecord

_MAX_QUEUED_LINES: Final = 1000
"""Maximum number of lines in the queue to the writer thread. Further lines are dropped."""

_GATHER_SECONDS: Final = 0.1
"""Time in seconds for which lines of requests are gathered before they are written.

A writer thread that runs for every request takes the interpreter from the event loop, and may lose the
processor to a runner before it gives the interpreter back.
"""

_FLUSH_TIMEOUT: Final = 1.0
"""Time limit in seconds for writing the last lines when the process ends."""

_TRACEPARENT_FORMAT: Final = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
"""Format of the `traceparent` header: W3C Trace Context, level 1, section 3.2. Later versions may append
fields."""


# --- the access log ------------------------------------------------------------------------------


_STANDARD_LOGGER: Final = logging.getLogger("fovea.access")


class AccessLog:
    """Access log with a limit on lines per second for each status class."""

    def __init__(self, max_per_second: int) -> None:
        self._limits: defaultdict[int, _LineLimit] = defaultdict(lambda: _LineLimit(max_per_second))
        """Rate limits by the first digit of the status, so that client errors (4xx) cannot hide server errors
        (5xx)."""

    def take_line(self, record: RequestRecord) -> bool:
        """Return whether a finished request gets a line, and count the line."""
        if not _STANDARD_LOGGER.isEnabledFor(_choose_level(record)):
            return False
        return self._limits[record.status // 100].count_line()

    def write(self, record: RequestRecord, seconds: float, trace_id: str) -> None:
        """Log a finished request for which `take_line` was true. Does nothing if no log is configured."""
        fields = _log_fields(record, seconds, trace_id)
        dropped_field = self._limits[record.status // 100].take_dropped_field()
        level = logging.getLevelName(_choose_level(record)).lower()
        # Not through `logging`, which takes longer than everything else for a request.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _ThreadedHandler):
                handler.write_event(level, {"event": "request", **fields, **dropped_field})


def _choose_level(record: RequestRecord) -> int:
    """Return the level of a request's line.

    The level is `debug` for successful requests without a model, such as probes, scrapes and pages. It is
    `warning` for status 500 and above, and `info` for all other requests.
    """
    if not (record.reason or record.model):
        return logging.DEBUG
    return logging.WARNING if record.status >= 500 else logging.INFO


class _LineLimit:
    """Limit on lines per second, with a count of the dropped lines."""

    def __init__(self, max_per_second: int) -> None:
        self._max_per_second = max_per_second
        self._second = self._line_count = self._dropped_count = 0

    def count_line(self) -> bool:
        """Count a line and return whether the line is within the limit of the current second."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._line_count = second, 0
        self._line_count += 1
        if self._line_count <= self._max_per_second:
            return True
        self._dropped_count += 1
        return False

    def take_dropped_field(self) -> dict[str, int]:
        """Return the number of lines dropped since the last call as a log field.

        The result is empty if no line was dropped.
        """
        dropped_count, self._dropped_count = self._dropped_count, 0
        return {"left_out": dropped_count} if dropped_count else {}


def _log_fields(record: RequestRecord, seconds: float, trace_id: str) -> dict[str, Any]:
    """Return the fields of an access log line, named like the metrics and their labels.

    The fields contain no body, no query and no API key. The only header values are the ids and the client
    address that a trusted proxy reports. `caller` is the name of a key, as in the keys file.
    """
    longest = record.longest_stages()
    fields = {
        "request_id": record.request_id,
        "trace_id": trace_id,
        "client": record.client,
        "caller": record.credential.name,
        "peer": record.peer if record.peer != record.client else "",
        "method": record.method,
        "protocol": record.protocol.name,
        "route": record.route,
        "model": record.model,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "images": record.images,
        "image_errors": record.image_errors,
        "warnings": record.warnings,
        "batch_images": longest["inference"].batch_size if "inference" in longest else 0,
        "request_seconds": round(seconds, 6),
        "stage_seconds": {name: round(stage.seconds, 6) for name, stage in longest.items()},
    }
    return {name: value for name, value in fields.items() if value or name in _REQUIRED_FIELDS}


_REQUIRED_FIELDS: Final = ("route", "status")
"""Fields that are logged even when they are empty."""


def parse_trace_id(traceparent: bytes) -> str:
    """Return the trace id in a `traceparent` header, or an empty string if the header is not valid."""
    header_match = _TRACEPARENT_FORMAT.fullmatch(traceparent)
    return header_match[1].decode() if header_match and header_match[1].strip(b"0") else ""


# --- writing -------------------------------------------------------------------------------------


def configure_logging(
    level: str, style: Literal["auto", "json", "text"], stream: Literal["stderr", "stdout"] = "stderr"
) -> None:
    """Send the log of this process to a standard stream.

    With style `auto`, the log is text if the stream is a terminal, otherwise JSON.
    """
    file = sys.stdout if stream == "stdout" else sys.stderr
    is_terminal = file is not None and file.isatty()
    as_text = style == "text" or (style == "auto" and is_terminal)
    shared_processors: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[Processor] = []
    if as_text:
        # Other formatters print local variables, such as images.
        plain_traceback = structlog.dev.plain_traceback
        renderers += [
            _flatten_stages,
            structlog.dev.ConsoleRenderer(
                colors=is_terminal, sort_keys=False, pad_event_to=0, exception_formatter=plain_traceback
            ),
        ]
    else:
        renderers += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_render_json)]
    structlog.configure(
        [*shared_processors, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    foreign_processors: list[Processor] = [structlog.stdlib.add_logger_name, *shared_processors]
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        foreign_pre_chain=foreign_processors,
    )
    handler = _ThreadedHandler(formatter, [*shared_processors, *renderers], _DESCRIPTORS[stream])
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _render_json(event: EventDict, **_: Any) -> str:
    """Render an event as JSON, with the time, the level and the event first."""
    leading_fields = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    ordered_event = {**leading_fields, **event}
    try:
        return orjson.dumps(ordered_event, default=repr).decode()
    except TypeError:  # a file name that is not valid UTF-8
        return json.dumps(ordered_event, default=repr)


def _flatten_stages(_logger: Any, _name: str, event: EventDict) -> EventDict:
    """Replace the `stage_seconds` object by readable fields such as `decode=0.2ms`."""
    for name, seconds in event.pop("stage_seconds", {}).items():
        event[name] = f"{1000 * seconds:.1f}ms"
    return event


_DESCRIPTORS: Final = {"stdout": 1, "stderr": 2}
"""File descriptors of the standard streams."""


class _ThreadedHandler(logging.Handler):
    """Logging handler that passes each line to a writer thread.

    A separate thread is needed because a write to a pipe that nobody reads blocks for ever.
    """

    def __init__(
        self, formatter: logging.Formatter, processors: Sequence[Processor], descriptor: int
    ) -> None:
        """Start the writer thread. `processors` render an event that does not come through `logging`."""
        super().__init__()
        self._processors = processors
        self._descriptor = descriptor
        self.setFormatter(formatter)
        self._lines: queue.Queue[bytes] = queue.Queue(_MAX_QUEUED_LINES)
        self._is_urgent = threading.Event()
        """Event that is set when the writer thread shall not gather more lines."""
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line and write it at once, or drop the line if the queue is full.

        Runs on the thread that logs, which must never wait. `logging.Handler.handleError` reports errors in
        formatting.
        """
        try:
            self._put_line(self.format(record))
        except Exception:
            self.handleError(record)
        self._is_urgent.set()

    def write_event(self, level: str, event: EventDict) -> None:
        """Queue the line of an event and write it within `_GATHER_SECONDS`, or drop it as `emit` does."""
        rendered: Any = event
        for process in self._processors:
            rendered = process(None, level, rendered)
        self._put_line(rendered)

    def _put_line(self, line: str) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait((line + "\n").encode(errors="replace"))
        if self._lines.qsize() > _MAX_QUEUED_LINES // 2:
            self._is_urgent.set()

    def _write_lines(self) -> None:
        """Write queued lines to the stream. Runs in the writer thread."""
        while True:
            lines = [self._lines.get()]
            self._is_urgent.wait(_GATHER_SECONDS)
            self._is_urgent.clear()  # before the queue is read: a line that follows sets it again
            with contextlib.suppress(queue.Empty):
                while True:
                    lines.append(self._lines.get_nowait())
            for content in _join_lines(lines):
                self._write_content(content)
            # After the write, so that `flush` also waits for the lines being written.
            for _ in lines:
                self._lines.task_done()

    def _write_content(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # the stream is closed: nothing can report this
            while content:
                try:
                    content = content[os.write(self._descriptor, content) :]
                except BlockingIOError:  # another process that shares the stream made it non-blocking
                    select.select([], [self._descriptor], [])

    def flush(self) -> None:
        """Wait until the lines are written, for at most `_FLUSH_TIMEOUT` seconds.

        `logging.shutdown` calls this when the process ends, while the writer thread goes on writing.
        """
        self._is_urgent.set()
        deadline = time.monotonic() + _FLUSH_TIMEOUT
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.001)


def _join_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines to pieces that the system writes to a pipe as a whole (pipe(7), PIPE_BUF).

    Workers share the stream, and a longer piece could have lines of another worker in its middle. A single
    line may be longer.
    """
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > select.PIPE_BUF:
            yield piece
            piece = b""
        piece += line
    yield piece
