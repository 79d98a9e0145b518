"""The service's side of an explaining process, which starts with the first question and ends when idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import orjson

from fovea.service.errors import Internal, Overloaded, error_from_dict
from fovea.service.runners import spawn
from fovea.service.runners.frames import MAX_PIECE_BYTES
from fovea.service.runners.load_messages import MAX_EXPLAINER_MODELS, Failure
from fovea.service.runners.memory_plan import SpareMemory, estimate_process_bytes
from fovea.service.serving.registry import LiveModel

log = logging.getLogger(__name__)

_MAX_WAITING: Final = 8
"""Maximum number of questions that wait; the process answers one question at a time."""

_SILENCE_TIMEOUT: Final = 60.0
"""Seconds without a message after which the process is killed. Loading a large model takes 2 seconds."""

_STOP_TIMEOUT: Final = 5.0
"""Seconds that the process has to stop after its caller has left."""

_LENGTHS: Final = struct.Struct("<II")


class ExplainerReply(NamedTuple):
    """A reply of the explaining process."""

    values: dict[str, Any]
    pieces: Sequence[bytes]
    """Binary part of the reply, a picture or an array. It comes in pieces because copying all of it would
    block the event loop."""


class _ProtocolError(Exception):
    """The process sent a message that does not answer the current question."""


@dataclass
class _PendingRequest:
    """A question that has been asked and not yet answered."""

    has_begun: bool = False
    """True once the question holds the lock of the process."""
    is_abandoned: bool = False
    """True once the caller has left."""


class ExplainerClient:
    """The client of one explaining process. Every method must be called on the event loop."""

    def __init__(self, *, idle_seconds: float, memory: SpareMemory | None = None) -> None:
        """Create the client; the process starts with the first question.

        The process ends after `idle_seconds` seconds without a question. Its memory is reserved in `memory`;
        None means no limit.
        """
        self._idle_seconds = idle_seconds
        self._memory = memory
        self._give_back: Callable[[], None] | None = None
        """Function that returns the reserved memory of the process."""
        self._lock = asyncio.Lock()
        self._waiting_count = 0
        self._process: _Process | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        if memory:
            memory.add_claim_callback(self._end_if_idle)

    async def send_request(
        self,
        model: LiveModel,
        request: dict[str, Any],
        image: bytes = b"",
        on_part: Callable[[dict[str, Any]], None] = lambda part: None,
    ) -> ExplainerReply:
        """Ask a question about a model and wait for the answer; `on_part` gets the partial answers.

        Raises `RequestError`: an error of the image or the question, `Overloaded` if too many questions wait
        or memory is short, or `Internal`. If the caller is cancelled, it stops waiting, and the process gets
        a `stop` message.
        """
        if self._waiting_count >= _MAX_WAITING:
            raise Overloaded(f"{_MAX_WAITING} explanations are waiting already", retry_after=2.0)
        pending_request = _PendingRequest()
        self._waiting_count += 1
        # The model's file must stay open as long as the process may read it, even if the caller leaves.
        # `_finish_request` releases the model.
        model.acquire()
        task = asyncio.create_task(self._run_exclusively(pending_request, model, request, image, on_part))
        task.add_done_callback(partial(self._finish_request, model))
        # The task is shielded: cancelling the caller must not leave a half-written frame in the stream.
        # `_leave` stops the task in order.
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._leave(pending_request, task)
            raise

    async def _run_exclusively(
        self,
        pending_request: _PendingRequest,
        model: LiveModel,
        request: dict[str, Any],
        image: bytes,
        on_part: Callable[[dict[str, Any]], None],
    ) -> ExplainerReply:
        """Wait for the lock, and send the question to the process.

        The lock belongs to this task and not to the caller, who may leave at any time.
        """
        async with self._lock:
            pending_request.has_begun = True
            self._cancel_idle_timer()
            try:
                return await self._request_reply(pending_request, model, request, image, on_part)
            finally:
                if self._memory and self._memory.is_claimed:
                    self.close()
                else:
                    self._idle_timer = asyncio.get_running_loop().call_later(self._idle_seconds, self.close)

    def _leave(self, pending_request: _PendingRequest, task: asyncio.Task[ExplainerReply]) -> None:
        """Stop working for a caller that has left.

        A question that waits is cancelled. A question in progress is stopped, and the process is killed after
        `_STOP_TIMEOUT` seconds if it has not stopped.
        """
        pending_request.is_abandoned = True
        if not pending_request.has_begun:
            task.cancel()
        elif self._process and not task.done():
            self._process.stop()
            loop = asyncio.get_running_loop()
            loop.call_later(
                _STOP_TIMEOUT, lambda process: None if task.done() else process.kill(), self._process
            )

    def _finish_request(self, model: LiveModel, task: asyncio.Task[ExplainerReply]) -> None:
        self._waiting_count -= 1
        model.release()
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, because the caller may have left

    async def _request_reply(
        self,
        pending_request: _PendingRequest,
        model: LiveModel,
        request: dict[str, Any],
        image: bytes,
        on_part: Callable[[dict[str, Any]], None],
    ) -> ExplainerReply:
        try:
            if self._process and self._process.is_over:  # the process ended while nobody asked
                self.close()
            if self._process is None:
                self._reserve(model)
                self._process = await _Process.start(self._memory.decode_bytes if self._memory else None)
            if pending_request.is_abandoned:  # the caller left while the process started
                raise asyncio.CancelledError
            reply = await self._process.send_request(model, request, image, on_part)
        except (OSError, EOFError, TimeoutError, ValueError, _ProtocolError) as error:
            self.close()
            log.error("the explaining process is given up: %s", repr(error))
            raise Internal("the process that explains died, or said nothing for too long") from None
        except BaseException:  # the stream may end in the middle of a frame, so that nobody else may use it
            if self._process and self._process.is_busy:
                self.close()
            raise
        if "error" in reply.values:
            raise error_from_dict(reply.values["error"])
        if failure := Failure.from_dict(reply.values):
            log.error("a question could not be answered: %s\n%s", failure.reason, failure.trace)
            raise Internal("internal error; the log has it")
        return reply

    def _reserve(self, model: LiveModel) -> None:
        """Reserve the memory that the process will need.

        Raises `Overloaded` if the memory is not free.
        """
        if self._memory is None:
            return
        size = estimate_process_bytes([model.load] * MAX_EXPLAINER_MODELS) + self._memory.decode_bytes
        self._give_back = None if self._memory.is_claimed else self._memory.reserve(size)
        if self._give_back is None:
            raise Overloaded(
                f"an explanation needs {size >> 20} MB of memory, which is not free now: the container is "
                "limited, and classifications come first",
                retry_after=5.0,
            )

    def _end_if_idle(self) -> None:
        """End the process, unless it is answering: `_run_exclusively` then ends it after the answer."""
        if self._process and not self._lock.locked():
            self.close()

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()
            self._idle_timer = None

    def close(self) -> None:
        """End the process, and release its memory reservation."""
        self._cancel_idle_timer()
        # Both fields are cleared first, so that a second call does nothing.
        process, self._process = self._process, None
        give_back, self._give_back = self._give_back, None
        try:
            if process:
                process.kill()
        finally:
            if give_back:
                give_back()


class _Process:
    """One process and its socket.

    Only `send_request` and `stop` write to the socket, and never while the other one writes, so that no frame
    is interrupted by another frame. Questions are numbered, and every reply repeats the number of its
    question. A reply with another number, or a reply that cannot be read, raises an error. The caller must
    then end the process, because replies can no longer be matched to questions.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decode_bytes: int | None = None,
    ) -> None:
        """Wrap a started process.

        `decode_bytes` is the memory limit for decoding an image; None means the limit of all runners
        together.
        """
        self._process = process
        self._decode_bytes = decode_bytes
        self._reader = reader
        self._writer = writer
        self._request_number = 0
        """Number of the last question."""
        self._is_sending = False
        """True until the last question is completely written."""
        self._is_stop_due = False
        """True if `stop` must be sent after the question is completely written."""
        self.is_busy = False
        """True from the start of a question until its final reply."""
        self._loaded_model_ids: list[int] = []
        """Ids of the models that the process has loaded and whose contracts it has, in the order of their
        last use."""

    @classmethod
    async def start(cls, decode_bytes: int | None) -> _Process:
        """Start the process.

        Raises `OSError`.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = spawn.start_process("explain.process", [theirs.fileno()])
        ours.setblocking(False)
        return cls(process, *await asyncio.open_connection(sock=ours), decode_bytes)

    async def send_request(
        self,
        model: LiveModel,
        request: dict[str, Any],
        image: bytes,
        on_part: Callable[[dict[str, Any]], None],
    ) -> ExplainerReply:
        """Send a question and wait for its reply; `on_part` gets the partial replies.

        Raises `EOFError` or `OSError` if the process ends, `TimeoutError` if it neither reads nor writes for
        `_SILENCE_TIMEOUT` seconds, and `ValueError` or `_ProtocolError` if the reply does not belong to this
        question.
        """
        self._request_number += 1
        self.is_busy = self._is_sending = True
        self._is_stop_due = False
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as timeout:

            def extend() -> None:
                timeout.reschedule(loop.time() + _SILENCE_TIMEOUT)

            await self._write_request(model, request, image, extend)
            # Partial replies come until the final one. Each reply proves that the process is alive.
            while True:
                extend()
                reply = await self._receive_reply()
                if reply.values.pop("number", None) != self._request_number:
                    raise _ProtocolError(f"a reply that does not belong to question {self._request_number}")
                if not reply.values.pop("part", False):
                    self.is_busy = False
                    return reply
                on_part(reply.values)
        raise TimeoutError

    async def _write_request(
        self, model: LiveModel, request: dict[str, Any], image: bytes, extend: Callable[[], None]
    ) -> None:
        """Write the whole frame; `extend` restarts the time limit after each piece."""
        # The process drops the least recently used model in the same way as `_loaded_model_ids`, so that both
        # sides agree on which contracts the process has.
        model_id = model.load.model_id
        contract = None if model_id in self._loaded_model_ids else model.load_result.contract_json
        load = model.load
        if self._decode_bytes is not None:
            load = replace(load, plan=replace(load.plan, decode_bytes=self._decode_bytes))
        values = {**request, "number": self._request_number, "load": asdict(load), "contract": contract}
        self._write_header(values, len(image))
        for start in range(0, len(image), MAX_PIECE_BYTES):
            extend()
            self._writer.write(image[start : start + MAX_PIECE_BYTES])
            await self._writer.drain()
        self._loaded_model_ids = [*(one for one in self._loaded_model_ids if one != model_id), model_id][
            -MAX_EXPLAINER_MODELS:
        ]
        self._is_sending = False
        if self._is_stop_due:
            self._write_header({"stop": self._request_number}, 0)

    @property
    def is_over(self) -> bool:
        """Return True if the process has ended by itself."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Tell the process that nobody waits for the answer any more.

        If the question is not completely written yet, `stop` is sent after it.
        """
        if self._is_sending:
            self._is_stop_due = True
        elif self.is_busy:
            self._write_header({"stop": self._request_number}, 0)

    def _write_header(self, values: dict[str, Any], payload: int) -> None:
        """Write the head of a frame; the caller writes the `payload` bytes that follow."""
        header = orjson.dumps(values)
        self._writer.write(_LENGTHS.pack(len(header), payload) + header)

    async def _receive_reply(self) -> ExplainerReply:
        header, payload = _LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size))
        values = orjson.loads(await self._reader.readexactly(header))
        if not isinstance(values, dict):
            raise _ProtocolError("a reply that is not an object")
        sizes = (min(MAX_PIECE_BYTES, payload - start) for start in range(0, payload, MAX_PIECE_BYTES))
        return ExplainerReply(values, [await self._reader.readexactly(size) for size in sizes])

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._writer.transport.abort()
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().run_in_executor(None, self._process.wait)
