"""The service's side of an explaining process, which starts with the first question and ends when idle."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Generic

from fovea.service.errors import Internal, NotReady, Overloaded, RequestError, error_from_dict
from fovea.service.explain.messages import (
    MAX_CONTENT_BYTES,
    ContentPart,
    ExplainerReply,
    ExplainerRequest,
    HeatmapProgress,
    Question,
    Refusal,
    Result,
    StopCommand,
)
from fovea.service.resources.cgroup import Cgroup
from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.frame_stream import FrameStream
from fovea.service.runners.frames import Frame, FrameError
from fovea.service.runners.load_messages import MAX_EXPLAINER_MODELS
from fovea.service.runners.memory_plan import SpareMemory, estimate_process_bytes
from fovea.service.runners.messages import Failure, NumberedMessage
from fovea.service.serving.live_model import LiveModel

log = logging.getLogger(__name__)

MAX_WAITING_QUESTIONS: Final = 8
"""Maximum number of questions that wait; the process answers one question at a time."""

_SILENCE_TIMEOUT: Final = 60.0
"""Seconds without a message after which the process is killed. Loading a large model takes 2 seconds."""

_STOP_TIMEOUT: Final = 5.0
"""Seconds that the process has to stop after its caller has left."""

_RETRY_SECONDS: Final = 1.0
"""Time in seconds after which a caller may try again whose process was killed."""

_REPLIES: Final[dict[str, type[NumberedMessage]]] = {
    one.__name__: one for one in (HeatmapProgress, ContentPart, ExplainerReply, Refusal, Failure)
}


@dataclass(frozen=True)
class ExplainerAnswer(Generic[Result]):
    """The answer to a question."""

    result: Result
    pieces: Sequence[bytes]
    """Content of the reply, a picture or an array. It comes in pieces because copying all of it would block
    the event loop."""


@dataclass(eq=False)
class PendingQuestion(Generic[Result]):
    """A question of a caller, and the answer as far as it has arrived."""

    model: LiveModel
    question: Question[Result]
    image: bytes = b""
    on_progress: Callable[[HeatmapProgress], None] = lambda progress: None
    has_begun: bool = False
    """True once the question holds the lock of the process."""
    is_abandoned: bool = False
    """True once the caller has left."""
    number: int = 0
    """Number of the request; 0 before it is sent."""
    content_size: int = 0
    pieces: list[bytes] = field(default_factory=list)
    result: asyncio.Future[Result] = field(default_factory=asyncio.Future)


class ExplainerClient:
    """The client of one explaining process. Every method must be called on the event loop."""

    def __init__(
        self, *, idle_seconds: float, memory: SpareMemory | None = None, cgroup: Cgroup | None = None
    ) -> None:
        """Create the client; the process starts with the first question.

        The process ends after `idle_seconds` seconds without a question. Its memory is reserved in `memory`;
        None means no limit.
        """
        self._idle_seconds = idle_seconds
        self._memory = memory
        self._cgroup = cgroup or Cgroup()
        self._give_back: Callable[[], None] | None = None
        """Function that returns the reserved memory of the process."""
        self._lock = asyncio.Lock()
        self._waiting_count = 0
        self._connection: ExplainerConnection | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        if memory:
            memory.add_claim_callback(self._end_if_idle)

    async def send_request(
        self,
        model: LiveModel,
        question: Question[Result],
        image: bytes = b"",
        on_progress: Callable[[HeatmapProgress], None] = lambda progress: None,
    ) -> ExplainerAnswer[Result]:
        """Ask a question about a model and wait for the answer; `on_progress` gets the steps before it.

        Raises `RequestError`: an error of the image or the question, `Overloaded` if too many questions wait
        or memory is short, `NotReady` if somebody kills the process or no process can be started, or
        `Internal`. If the caller is cancelled, it stops waiting, and the process gets a `StopCommand`.
        """
        if self._waiting_count >= MAX_WAITING_QUESTIONS:
            raise Overloaded(f"{MAX_WAITING_QUESTIONS} explanations are waiting already", retry_after=2.0)
        pending = PendingQuestion(model, question, image, on_progress)
        self._waiting_count += 1
        # The model's file must stay open as long as the process may read it, even if the caller leaves.
        # `_finish_request` releases the model.
        model.acquire()
        task = asyncio.create_task(self._run_exclusively(pending))
        task.add_done_callback(partial(self._finish_request, model))
        # The task is shielded: the process may still work on the question of a caller that has left, and no
        # other question may reach it before its reply. `_leave` stops the task in order.
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._leave(pending, task)
            raise

    async def _run_exclusively(self, pending: PendingQuestion[Result]) -> ExplainerAnswer[Result]:
        """Wait for the lock, and send the question to the process.

        The lock belongs to this task and not to the caller, who may leave at any time.
        """
        async with self._lock:
            pending.has_begun = True
            self._cancel_idle_timer()
            try:
                return await self._request_answer(pending)
            finally:
                if self._memory and self._memory.is_claimed:
                    self.close()
                else:
                    self._idle_timer = asyncio.get_running_loop().call_later(self._idle_seconds, self.close)

    def _leave(self, pending: PendingQuestion[Any], task: asyncio.Task[Any]) -> None:
        """Stop working for a caller that has left.

        A question that waits is cancelled. A question in progress is stopped, and the process is killed after
        `_STOP_TIMEOUT` seconds if it has not stopped.
        """
        pending.is_abandoned = True
        if not pending.has_begun:
            task.cancel()
        elif self._connection and not task.done():
            self._connection.stop_request()
            loop = asyncio.get_running_loop()
            loop.call_later(
                _STOP_TIMEOUT,
                lambda connection: None if task.done() else connection.give_up(),
                self._connection,
            )

    def _finish_request(self, model: LiveModel, task: asyncio.Task[Any]) -> None:
        self._waiting_count -= 1
        model.release()
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, because the caller may have left

    async def _request_answer(self, pending: PendingQuestion[Result]) -> ExplainerAnswer[Result]:
        oom_kill_count = self._cgroup.oom_kill_count()
        try:
            if self._connection and self._connection.has_ended:  # while nobody asked
                self.close()
            if self._connection is None:
                self._reserve(pending.model)
                # In a thread: the start waits for the fork server, which may have to be started too.
                process = await asyncio.to_thread(ChildProcess, "explain.process")
                connection = ExplainerConnection(process, self._memory.decode_bytes if self._memory else None)
                await connection.connect()
                self._connection = connection
            if pending.is_abandoned:  # the caller left while the process started
                raise asyncio.CancelledError
            return await self._connection.send_request(pending)
        except (OSError, EOFError, FrameError) as error:
            raise await self._give_up(error, oom_kill_count) from None
        except BaseException:  # its reply may still come, so that nobody else may use the process
            if self._connection and self._connection.is_busy:
                self.close()
            raise

    async def _give_up(self, error: Exception, oom_kill_count: int | None) -> RequestError:
        """Give up the process, and return the error for the caller.

        A process that was killed from outside says nothing about the question: another attempt may succeed.
        If it crashed, hung, sent nonsense, or was killed for lack of memory since there were
        `oom_kill_count` such kills, the question may be the reason. Where no control group counts these
        kills, every kill counts as one from outside.
        """
        connection = self._connection
        status = None
        try:
            if connection and isinstance(error, EOFError):
                # Before `close`, which kills the process if it is still ending.
                status = await asyncio.to_thread(connection.process.wait_exit)
        finally:
            self.close()
        log.error("the explaining process is given up: %s, exit status %s", repr(error), status)
        if connection is None:
            return NotReady("no process that explains can be started now", retry_after=_RETRY_SECONDS)
        if status == -signal.SIGKILL and self._cgroup.oom_kill_count() == oom_kill_count:
            return NotReady("the process that explains was killed", retry_after=_RETRY_SECONDS)
        return Internal("the process that explains died, or said nothing for too long")

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
        if self._connection and not self._lock.locked():
            self.close()

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()
            self._idle_timer = None

    def close(self) -> None:
        """End the process, and release its memory reservation."""
        self._cancel_idle_timer()
        # Both fields are cleared first, so that a second call does nothing.
        connection, self._connection = self._connection, None
        give_back, self._give_back = self._give_back, None
        try:
            if connection:
                connection.give_up()
                asyncio.get_running_loop().run_in_executor(None, connection.process.wait_exit)
        finally:
            if give_back:
                give_back()


class ExplainerConnection(FrameStream):
    """The stream to one explaining process, which answers one question at a time.

    A reply that does not belong to the question raises an error, and the process is killed: replies can no
    longer be matched to questions.
    """

    def __init__(self, process: ChildProcess, decode_bytes: int | None = None) -> None:
        """Prepare the stream to a started process.

        `decode_bytes` is the memory limit for decoding an image; None means the limit of all runners
        together.
        """
        super().__init__(process)
        self._decode_bytes = decode_bytes
        self._last_number = 0
        self._pending: PendingQuestion[Any] | None = None
        self._loaded_model_ids: list[int] = []
        """Ids of the models that the process has loaded and whose contracts it has, in the order of their
        last use."""

    @property
    def is_busy(self) -> bool:
        """True from the start of a question until its final reply."""
        return self._pending is not None

    @property
    def has_ended(self) -> bool:
        """True if the process has ended, also if the event loop does not know yet."""
        return self.is_lost or self.process.has_exited

    async def send_request(self, pending: PendingQuestion[Result]) -> ExplainerAnswer[Result]:
        """Send a question and wait for its reply; `on_progress` gets the steps before it.

        Raises `EOFError` if the process ends, `TimeoutError` if it neither reads nor writes for
        `_SILENCE_TIMEOUT` seconds, `FrameError` if the reply does not belong to this question, and
        `RequestError` if the process refuses the question.
        """
        if self.is_lost:
            raise EOFError("the process has ended")
        self._last_number = pending.number = self._last_number + 1
        # Encode before anything is recorded: a question that cannot be encoded gets no reply.
        pieces = list(self._create_request(pending).to_pieces([pending.image]))
        # Before the message is sent: the reply, or the loss of the process, must find the future.
        self._pending = pending
        self._start_watchdog(_SILENCE_TIMEOUT)
        self.send(pieces)
        # This wait ends: the final reply, the watchdog or the loss of the process sets the future.
        return ExplainerAnswer(await pending.result, pending.pieces)

    def _create_request(self, pending: PendingQuestion[Any]) -> ExplainerRequest:
        # The process drops the least recently used model in the same way as `_loaded_model_ids`, so that both
        # sides agree on which contracts the process has.
        model, question = pending.model, pending.question
        load, model_id = model.load, model.load.model_id
        contract = None if model_id in self._loaded_model_ids else model.load_result.contract_json
        if self._decode_bytes is not None:
            load = replace(load, plan=replace(load.plan, decode_bytes=self._decode_bytes))
        self._loaded_model_ids = [*(one for one in self._loaded_model_ids if one != model_id), model_id][
            -MAX_EXPLAINER_MODELS:
        ]
        return ExplainerRequest(pending.number, load, contract, question)  # type: ignore[arg-type]  # all are listed

    def stop_request(self) -> None:
        """Tell the process that nobody waits for the answer any more."""
        if self._pending:
            self.send(StopCommand(self._pending.number).to_pieces())

    def resume_writing(self) -> None:
        """Continue writing. The process has read, so that it is alive."""
        self._extend_watchdog()
        super().resume_writing()

    def _extend_watchdog(self) -> None:
        self._stop_watchdog()
        if self.is_busy:
            self._start_watchdog(_SILENCE_TIMEOUT)

    def _handle_frame(self, frame: Frame) -> None:
        message = _REPLIES.get(frame.kind, ExplainerReply).from_frame(frame)
        pending = self._pending
        if pending is None or message.number != pending.number:
            current = f"question {pending.number}" if pending else "nothing"
            raise FrameError(f"answered question {message.number} instead of {current}")
        match message:
            case HeatmapProgress():
                pending.on_progress(message)
            case ContentPart():
                pending.content_size += len(frame.content)
                if pending.content_size > MAX_CONTENT_BYTES:
                    raise FrameError(f"sent more than {MAX_CONTENT_BYTES} bytes")
                pending.pieces.append(bytes(frame.content))
            case ExplainerReply(_, result, content_size):
                expected = pending.question.result_type
                if not isinstance(result, expected) and not (result is None and pending.is_abandoned):
                    raise FrameError(f"sent a {type(result).__name__} instead of {expected.__name__}")
                if content_size != pending.content_size:
                    raise FrameError(f"sent {pending.content_size} bytes instead of {content_size}")
                self._finish(result)
            case Refusal(_, code, text):
                self._finish(error_from_dict({"code": code, "message": text}))
            case Failure(_, reason, _, trace):
                log.error("a question could not be answered: %s\n%s", reason, trace)
                self._finish(Internal("internal error; the log has it"))
        self._extend_watchdog()

    def _finish(self, outcome: Any) -> None:
        """Give the outcome to the waiting task, unless that was cancelled."""
        pending, self._pending = self._pending, None
        if pending is None or pending.result.done():
            return
        if isinstance(outcome, Exception):
            pending.result.set_exception(outcome)
        else:
            pending.result.set_result(outcome)

    def _handle_fault(self, error: FrameError | TimeoutError) -> None:
        if self._pending is None:  # otherwise the waiting task writes to the log
            log.error("the explaining process is given up: %s", repr(error))
        self._finish(error)

    def _handle_lost(self, _watched_seconds: float) -> None:
        self._finish(EOFError("the process has ended"))
