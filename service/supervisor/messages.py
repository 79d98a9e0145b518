"""Messages between the supervisor and its workers.

    supervisor → worker    ServeCommand, on the standard input of the process: the state to start with
    worker → supervisor    StartingHeartbeat, repeated: the models are being loaded
    worker → supervisor    ReadyReport, or StartFailure: the models are loaded, or the reason why not
    supervisor → worker    ServeCommand, when the worker is admitted and at the end of every change
    supervisor → worker    PassedConnection, for each new connection
    worker → supervisor    ConnectionReport, after every change of a counter and as a heartbeat
    supervisor → worker    StopSignal
    worker → supervisor    NoMoreConnections; the supervisor then closes its side of the channel

A change begins in the supervisor, which watches the repository, or with a caller of a worker. It is a
two-phase commit.

    worker → supervisor    LoadModelRequest or UnloadModelRequest: a caller asks for a change
    supervisor → worker    PrepareRequest, to one worker and then to all others
    worker → supervisor    PrepareReply: the change is prepared, or the reason why not
    supervisor → worker    ServeCommand or AbandonCommand, to all workers
    supervisor → worker    ChangeReply to the caller's request
    worker → supervisor    LostModelReport, RefusedVersionReport: reasons for a change

A reply repeats the number of its request, and every request gets exactly one reply. The request stays open
until its reply arrives, even if nobody waits any more, so a late reply is no fault. A reply without an open
request is a fault, and so is a message that cannot be read: the worker ends, whichever side has sent it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

from pydantic import ValidationError

from fovea.service.artifact.repository import ModelConfig, ModelVersion, RefusedVersion, ServingState
from fovea.service.errors import (
    GoldenError,
    Internal,
    Interrupted,
    ModelError,
    ModelNotFound,
    RequestError,
    SwapRefused,
    Unproven,
    to_one_line,
)
from fovea.service.runners.frames import FrameError
from fovea.service.runners.messages import Message, NumberedMessage

_ERROR_TYPES: Final[Mapping[str, type[ModelError | RequestError]]] = {
    kind.__name__: kind
    for kind in (Interrupted, Unproven, GoldenError, ModelError, ModelNotFound, SwapRefused, Internal)
}
"""Types of errors that keep their type between processes. A type comes before its base."""

# --- parts of messages ---


@dataclass(frozen=True)
class VersionValues:
    """Values of a `ModelVersion`."""

    path: str
    name: str | None
    version: str | None
    fingerprint: Sequence[int]
    config: Mapping[str, Any]
    """Settings of the model that differ from the defaults."""

    @classmethod
    def from_version(cls, version: ModelVersion) -> VersionValues:
        """Return the values of a version."""
        config = version.config.model_dump(exclude_none=True)
        return cls(str(version.path), version.name, version.version, version.fingerprint, config)

    def to_version(self) -> ModelVersion:
        """Return the version. Raises `FrameError`."""
        try:
            config = ModelConfig.model_validate(self.config)
        except ValidationError as error:
            raise FrameError(f"sent settings that cannot be read: {to_one_line(error)}") from None
        return ModelVersion(Path(self.path), self.name, self.version, tuple(self.fingerprint), config)


@dataclass(frozen=True)
class ErrorValues:
    """An error that one process has raised, to be raised again in another one."""

    kind: str
    """Name of a type in `_ERROR_TYPES`."""
    message: str

    @classmethod
    def from_exception(cls, error: ModelError | RequestError) -> ErrorValues:
        """Return the values of an error. A type that is not in `_ERROR_TYPES` becomes a more general one."""
        kind = next((one for one in _ERROR_TYPES.values() if isinstance(error, one)), Internal)
        return cls(kind.__name__, str(error) if isinstance(error, RequestError) else to_one_line(error))

    def to_exception(self) -> ModelError | RequestError:
        """Return the error as an exception."""
        return _ERROR_TYPES.get(self.kind, Internal)(self.message)


# --- from the supervisor ---


@dataclass(frozen=True)
class PassedConnection(Message):
    """A new connection, whose file descriptor is in the same packet.

    The descriptor is missing if the worker has no room for it. Both sides number connections in the order of
    these messages.
    """


@dataclass(frozen=True)
class StopSignal(Message):
    """A signal that the supervisor has received: the first one starts the shutdown of the worker."""

    signal: int


@dataclass(frozen=True)
class ServeCommand(Message):
    """The state to serve from now on.

    The worker has prepared all versions in it, and ends if it cannot serve them: it would serve other
    versions than the other workers.
    """

    versions: Sequence[VersionValues]
    """Versions in the order of their models, the latest version of each model last."""
    default_model: str | None
    refused_versions: Sequence[RefusedVersion]
    is_empty: bool

    @classmethod
    def from_state(cls, state: ServingState) -> ServeCommand:
        """Return the command to serve `state`."""
        versions = chain.from_iterable(state.versions_by_model.values())
        return cls([VersionValues.from_version(one) for one in versions], *state[1:])

    def to_state(self) -> ServingState:
        """Return the state. Raises `FrameError`."""
        groups = groupby((one.to_version() for one in self.versions), lambda one: one.name)
        versions_by_model = {name: tuple(versions) for name, versions in groups}
        return ServingState(
            versions_by_model, self.default_model, tuple(self.refused_versions), self.is_empty
        )


@dataclass(frozen=True)
class PrepareRequest(NumberedMessage):
    """Request to load these versions of a model, and to serve them only when a `ServeCommand` says so.

    `ServeCommand` or `AbandonCommand` follows, perhaps before the reply. With `force`, the versions are not
    compared with the served version.
    """

    name: str | None
    versions: Sequence[VersionValues]
    force: bool


@dataclass(frozen=True)
class AbandonCommand(Message):
    """Notice that a change of this model is not made: a worker has refused it, or it took too long."""

    name: str | None


@dataclass(frozen=True)
class ChangeReply(NumberedMessage):
    """Reply to a `LoadModelRequest` or an `UnloadModelRequest`, after the end of the change."""

    error: ErrorValues | None
    """None if the change was made."""


# --- from a worker ---


@dataclass(frozen=True)
class StartingHeartbeat(Message):
    """Proof that the worker is alive, at least every `HEARTBEAT_INTERVAL` seconds while it loads models."""


@dataclass(frozen=True)
class StartFailure(Message):
    """The last message of a worker that cannot start. The service ends, or replaces what is broken."""

    reason: str


@dataclass(frozen=True)
class ReadyReport(Message):
    """The worker can take connections. It gets some when the supervisor has admitted it."""

    names: str
    """Names of the served models, as text for the greeting."""
    route: str
    """Route to try, for the greeting."""


@dataclass(frozen=True)
class ConnectionReport(Message):
    """Numbers of connections since the start of the worker, so that a lost report does no harm.

    A worker that runs sends one at least every `HEARTBEAT_INTERVAL` seconds.
    """

    received: int
    closed: int
    missed: Sequence[int]
    """Numbers of received connections that came without a descriptor. The supervisor passes them on again."""


@dataclass(frozen=True)
class NoMoreConnections(Message):
    """Request for no further connections. The supervisor closes its side of the channel behind the last."""


@dataclass(frozen=True)
class PrepareReply(NumberedMessage):
    """Reply to a `PrepareRequest`, also if the change was abandoned meanwhile."""

    error: ErrorValues | None
    """None if the change is prepared."""


@dataclass(frozen=True)
class LoadModelRequest(NumberedMessage):
    """Request of a caller to load a model in all workers."""

    name: str | None
    version: str | None
    """Version to load; None for the repository's choice."""


@dataclass(frozen=True)
class UnloadModelRequest(NumberedMessage):
    """Request of a caller to unload a model in all workers."""

    name: str | None


@dataclass(frozen=True)
class LostModelReport(Message):
    """All runners of the worker have lost a model, or have it again."""

    name: str | None
    is_lost: bool


@dataclass(frozen=True)
class RefusedVersionReport(Message):
    """A version has failed its shadow test when it was loaded on demand. Another version takes its place."""

    version: VersionValues
    reason: str
    is_lasting: bool
    """False if a later attempt may succeed."""


ModelMessage: TypeAlias = ServeCommand | PrepareRequest | AbandonCommand | ChangeReply
"""Any message from the supervisor about models."""

SupervisorMessage: TypeAlias = PassedConnection | StopSignal | ModelMessage
"""Any message from the supervisor."""

ChangeRequest: TypeAlias = LoadModelRequest | UnloadModelRequest
"""Any request of a caller for a change."""

WorkerMessage: TypeAlias = (
    StartingHeartbeat
    | StartFailure
    | ReadyReport
    | ConnectionReport
    | NoMoreConnections
    | PrepareReply
    | ChangeRequest
    | LostModelReport
    | RefusedVersionReport
)
"""Any message from a worker."""

SUPERVISOR_MESSAGES: Final[Sequence[type[SupervisorMessage]]] = get_args(SupervisorMessage)
WORKER_MESSAGES: Final[Sequence[type[WorkerMessage]]] = get_args(WorkerMessage)
