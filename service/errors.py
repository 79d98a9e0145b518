"""Every error that Fovea raises on purpose.

    FoveaError
    ├── StartError          the process cannot start: one line on stderr, exit code 2
    │   ├── SettingsError   a setting is unknown or out of bounds
    │   └── ModelError      a model file that cannot be served
    │       └── ContractError  its contract is missing or makes no sense
    └── RequestError        one request, or one image of it, cannot be answered
        ├── BadRequest         400 bad_request
        ├── NotFound           404 not_found
        │   └── ModelNotFound  404 model_not_found
        ├── MethodNotAllowed   405 method_not_allowed
        ├── BodyTimeout        408 body_timeout
        ├── BodyTooLarge       413 body_too_large
        ├── TooManyPixels      413 too_many_pixels
        ├── UnsupportedFormat  415 unsupported_format
        ├── BadImage           422 bad_image
        ├── Unavailable        503, with Retry-After
        │   └── Overloaded     503 overloaded
        └── Internal           500 internal: our own bug, traced in the log and never shown

A message says what was wrong and what the limit is; it is written for the caller, and goes to the
caller as it stands.
"""

from __future__ import annotations

from typing import ClassVar


class FoveaError(Exception):
    """The root of everything raised on purpose."""


def one_line(error: Exception) -> str:
    """The message of any error without line breaks: for stderr, and inside other messages."""
    return " ".join(str(error).split())


class StartError(FoveaError):
    """The process cannot start. Raised before the service is ready; ends it with exit code 2."""


class SettingsError(StartError):
    """A setting is unknown, malformed or out of bounds."""


class ModelError(StartError):
    """A model file is missing, unreadable, or does not compute what it promises."""


class ContractError(ModelError):
    """The contract in a model file is missing, malformed or contradicts the graph."""


class RequestError(FoveaError):
    """One request, or one image of it, cannot be answered. `status` is HTTP's, `code` ours."""

    status: ClassVar[int]
    code: ClassVar[str]

    def to_dict(self) -> dict[str, str]:
        """What the caller is told, as plain values."""
        return {"code": self.code, "message": str(self)}


class BadRequest(RequestError):
    """The request is malformed: bad JSON, bad base64, no file, a parameter out of range."""

    status, code = 400, "bad_request"


class NotFound(RequestError):
    """There is nothing at this path."""

    status, code = 404, "not_found"


class ModelNotFound(NotFound):
    """No model, or no version of it, has this name."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method is not offered there."""

    status, code = 405, "method_not_allowed"


class BodyTimeout(RequestError):
    """The body did not arrive within the time limit."""

    status, code = 408, "body_timeout"


class BodyTooLarge(RequestError):
    """The body has, or promises, more bytes than the limit. Raised before the rest of it is read."""

    status, code = 413, "body_too_large"


class TooManyPixels(RequestError):
    """The image's header promises more pixels than the limit. Raised before any is decoded."""

    status, code = 413, "too_many_pixels"


class UnsupportedFormat(RequestError):
    """The bytes are not an image, or one of a format that is not served."""

    status, code = 415, "unsupported_format"


class BadImage(RequestError):
    """An image of a served format, but truncated, corrupt, or of a mode without a rule."""

    status, code = 422, "bad_image"


class Unavailable(RequestError):
    """Not now. `retry_after` is when to try again, in seconds."""

    status = 503

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class Internal(RequestError):
    """Our own bug. The caller learns the request id alone; the log has the trace."""

    status, code = 500, "internal"
