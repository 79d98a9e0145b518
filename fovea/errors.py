"""The errors that the Python API raises.

    FoveaError
    ├── StartError            the model cannot be loaded
    │   ├── SettingsError     a `FOVEA_*` variable is wrong
    │   └── ModelError        the file is missing, or is no model that can be served
    ├── FileError             an image file cannot be read; also an `OSError`
    ├── RequestError          an image, or a whole request, cannot be answered: `code`, `status`,
    │   │                     `message`, `retry_after`
    │   ├── BadImage …        the same classes for a model in this process and for a service
    │   ├── Unauthorized      the service needs an API key; `MissingScope`: the key may not do this
    │   └── Unavailable       the service was too busy, or stopping, for as long as the client tried
    │       └── CallerLimited this client has reached a limit that holds for each caller
    ├── UnexpectedReply       an HTTP reply that is not Fovea's, as of a proxy: `status`, `retry_after`
    ├── ConnectionFailed      no service answers at the address; also a `ConnectionError`
    └── AnswerTimeout         the service did not answer in time; also a `TimeoutError`

`fovea.service.errors` draws the classes below `RequestError`, which follow the codes of the HTTP API.
"""

from __future__ import annotations

from fovea.service.errors import (
    BadBox,
    BadImage,
    BadRequest,
    BodyTooLarge,
    CallerLimited,
    ContractError,
    DeadlineExceeded,
    Draining,
    FileError,
    FoveaError,
    GoldenError,
    Internal,
    MissingScope,
    ModelError,
    ModelNotFound,
    NoEmbedding,
    NotReady,
    Overloaded,
    RequestError,
    SettingsError,
    StartError,
    TooManyPixels,
    Unauthorized,
    Unavailable,
    UnsupportedFormat,
)

__all__ = [
    "AnswerTimeout",
    "BadBox",
    "BadImage",
    "BadRequest",
    "BodyTooLarge",
    "CallerLimited",
    "ConnectionFailed",
    "ContractError",
    "DeadlineExceeded",
    "Draining",
    "FileError",
    "FoveaError",
    "GoldenError",
    "Internal",
    "MissingScope",
    "ModelError",
    "ModelNotFound",
    "NoEmbedding",
    "NotReady",
    "Overloaded",
    "RequestError",
    "SettingsError",
    "StartError",
    "TooManyPixels",
    "Unauthorized",
    "Unavailable",
    "UnexpectedReply",
    "UnsupportedFormat",
]


class UnexpectedReply(FoveaError):
    """An HTTP reply that is not one of Fovea's, such as the error page of a proxy."""

    code = "unexpected_reply"

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        """Create the error of a reply with this HTTP status; `retry_after` is in seconds."""
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ConnectionFailed(FoveaError, ConnectionError):
    """There is no connection to the service, or it ended before the reply."""

    code = "connection_failed"


class AnswerTimeout(FoveaError, TimeoutError):
    """The service did not answer in time."""

    code = "answer_timeout"
