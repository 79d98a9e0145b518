"""Every error that Fovea raises on purpose.

    FoveaError
    ├── StartError          the process cannot start: one line on stderr, exit code 2
    │   ├── SettingsError   a setting is unknown or out of bounds
    │   └── ModelError      a model file that cannot be served
    │       ├── Interrupted    it was not to blame: it may be tried again
    │       ├── Unproven       its trial ended in a way for which the machine may be to blame
    │       ├── ContractError  its contract is missing or makes no sense
    │       └── GoldenError    this host does not compute what its golden set says
    └── RequestError        one request, or one image of it, cannot be answered
        ├── BadRequest         400 bad_request
        ├── BadHttp            400 bad_http
        ├── Forbidden          403 forbidden
        ├── NotFound           404 not_found
        │   └── ModelNotFound  404 model_not_found
        ├── MethodNotAllowed   405 method_not_allowed
        ├── BodyTimeout        408 body_timeout
        ├── HeaderTimeout      408 header_timeout
        ├── SwapRefused        409 swap_refused
        ├── BodyTooLarge       413 body_too_large
        ├── TooManyPixels      413 too_many_pixels
        ├── UnsupportedFormat  415 unsupported_format
        ├── BadImage           422 bad_image
        ├── HeaderTooLarge     431 header_too_large
        ├── Unavailable        503, with Retry-After
        │   ├── Overloaded     503 overloaded
        │   ├── NotReady       503 not_ready
        │   └── Draining       503 draining
        ├── DeadlineExceeded   504 deadline_exceeded
        └── Internal           500 internal: our own bug, traced in the log and never shown

A message says what was wrong and what the limit is; it is written for the caller, and goes to the
caller as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class FoveaError(Exception):
    """The root of everything raised on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the error from its message and its attributes, whatever its constructor takes."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[FoveaError], arguments: tuple[Any, ...]) -> FoveaError:
    """Make an error without its constructor, which may want other arguments than the message."""
    return kind.__new__(kind, *arguments)


def one_line(error: Exception) -> str:
    """The message of any error without line breaks: for stderr, and inside other messages.

    A library may quote a hostile file at any length: what is too long is cut.
    """
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


_LONGEST = 1000
"""Characters of a message."""


class StartError(FoveaError):
    """The process cannot start. Raised before the service is ready; ends it with exit code 2."""


class SettingsError(StartError):
    """A setting is unknown, malformed or out of bounds."""


class ModelError(StartError):
    """A model file is missing, unreadable, or does not compute what it promises."""


class Interrupted(ModelError):
    """A model could not be loaded for a reason that may be gone the next time."""


class Unproven(ModelError):
    """A trial was killed, or took too long on the clock: at another time it may end otherwise."""


class ContractError(ModelError):
    """The contract in a model file is missing, malformed or contradicts the graph."""


class GoldenError(ModelError):
    """This host does not compute what the golden set says."""


class RequestError(FoveaError):
    """One request, or one image of it, cannot be answered. `status` is HTTP's, `code` ours."""

    status: ClassVar[int]
    code: ClassVar[str]

    def __init__(self, message: str) -> None:
        """What is quoted in the message may be of any length: it is cut."""
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…")

    def to_dict(self) -> dict[str, str]:
        """What the caller is told, as plain values."""
        return {"code": self.code, "message": str(self)}


class BadRequest(RequestError):
    """The request is malformed: bad JSON, bad base64, no file, a parameter out of range."""

    status, code = 400, "bad_request"


class BadHttp(RequestError):
    """What arrives is not HTTP/1.1. Raised by the connection, which ends with it."""

    status, code = 400, "bad_http"


class Forbidden(RequestError):
    """What is asked for is switched off."""

    status, code = 403, "forbidden"


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
    """The body did not arrive within the time limit, in seconds."""

    status, code = 408, "body_timeout"

    def __init__(self, limit: float) -> None:
        super().__init__(f"the body did not arrive within {limit:g} s (FOVEA_BODY_TIMEOUT)")


class HeaderTimeout(RequestError):
    """The headers did not arrive within the time limit. Raised by the connection, which ends with it."""

    status, code = 408, "header_timeout"


class SwapRefused(RequestError):
    """A version of a model did not pass its checks; what was served still is."""

    status, code = 409, "swap_refused"


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


class HeaderTooLarge(RequestError):
    """The request line and headers have more bytes than the limit. Raised by the connection."""

    status, code = 431, "header_too_large"


class Unavailable(RequestError):
    """Not now. `retry_after` is when to try again, in seconds."""

    status = 503

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class NotReady(Unavailable):
    """There is no runner: all have died, and their successors are not there yet."""

    code = "not_ready"


class Draining(Unavailable):
    """The service is stopping; another instance, or this one when it is back, will take the request."""

    code = "draining"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was there."""

    status, code = 504, "deadline_exceeded"


class Internal(RequestError):
    """Our own bug. The caller learns the request id alone; the log has the trace."""

    status, code = 500, "internal"


def error_from(values: dict[str, str]) -> RequestError:
    """The error that `to_dict` has made plain values of; for those that a process of ours raises."""
    kinds = {kind.code: kind for kind in _OF_IMAGES}
    return kinds[values["code"]](values["message"])


_OF_IMAGES = (BadRequest, NotFound, TooManyPixels, UnsupportedFormat, BadImage, DeadlineExceeded, Internal)


def codes() -> list[str]:
    """The code of every error that a request can get."""
    return sorted({kind.code for kind in _below(RequestError) if hasattr(kind, "code")})


def _below(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)
