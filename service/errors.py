"""Every error that Fovea raises on purpose.

    FoveaError
    ├── StartError          the process cannot start: one line on stderr, exit code 2
    │   ├── SettingsError   a setting is unknown or out of bounds
    │   └── ModelError      a model file cannot be served
    │       ├── Interrupted    the cause was not the model: a later attempt may succeed
    │       ├── Unproven       the trial of the model ended in a way that the host may have caused
    │       ├── ContractError  the contract is missing or invalid
    │       └── GoldenError    this host does not reproduce the golden set
    ├── FileError           a file with an image cannot be read; also an `OSError`
    └── RequestError        one request, or one image of it, cannot be answered
        ├── BadRequest         400 bad_request
        ├── BadHttp            400 bad_http
        ├── Unauthorized       401 unauthorized, with WWW-Authenticate
        ├── Forbidden          403 forbidden
        │   └── MissingScope   403 missing_scope, with WWW-Authenticate
        ├── CertificateRequired  403 certificate_required
        ├── UrlNotAllowed      403 url_refused
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
        ├── BadBox             422 bad_box
        ├── UrlUnavailable     424 url_failed
        │   └── UrlTimeout     424 url_timeout
        ├── HeaderTooLarge     431 header_too_large
        ├── Unavailable        503, with Retry-After
        │   ├── Overloaded     503 overloaded
        │   ├── NotReady       503 not_ready
        │   ├── Draining       503 draining
        │   └── CallerLimited           429: this caller must wait, others need not
        │       ├── RateLimited         429 rate_limited
        │       ├── TooManyInFlight     429 too_many_in_flight
        │       └── ShareExceeded       429 share_exceeded
        ├── DeadlineExceeded   504 deadline_exceeded
        └── Internal           500 internal: our own bug, traced in the log and never shown

A message says what is wrong and names the limit. It is written for the caller and is sent to the caller
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class FoveaError(Exception):
    """The base class of all errors that are raised on purpose."""

    @property
    def message(self) -> str:
        """What is wrong, as a sentence for people."""
        return str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the error from its message and attributes, independent of its constructor's parameters."""
        return _restore_error, (type(self), self.args), self.__dict__


def _restore_error(error_type: type[FoveaError], arguments: tuple[Any, ...]) -> FoveaError:
    """Create an error without calling its constructor, which may need more than the message."""
    return error_type.__new__(error_type, *arguments)


def to_one_line(error: Exception) -> str:
    """Return the message of any error without line breaks, for stderr and for other messages.

    Shortens a message that is too long, because a library may quote a hostile file at any length. The end
    stays, because it says what to do.
    """
    line = " ".join(str(error).split())
    if len(line) <= _MAX_MESSAGE_LENGTH:
        return line
    return f"{line[: _MAX_MESSAGE_LENGTH - _MAX_END_LENGTH]} … {line[-_MAX_END_LENGTH:]}"


_MAX_MESSAGE_LENGTH = 1500
"""Maximum length of a message in characters."""

_MAX_END_LENGTH = 500
"""Length of the end of a message that is shortened, in characters: a command with several long paths."""


class StartError(FoveaError):
    """The process cannot start. Raised before the service is ready; the exit code is then 2."""


class SettingsError(StartError):
    """A setting is unknown, malformed or out of bounds."""


class ModelError(StartError):
    """A model file is missing, unreadable, or does not compute the results that its contract states."""


class Interrupted(ModelError):
    """A model could not be loaded for a reason that may have gone at the next attempt."""


class Unproven(ModelError):
    """A trial of a model was killed or exceeded its time limit; a later trial may end differently."""


class ContractError(ModelError):
    """The contract in a model file is missing, malformed or contradicts the graph."""


class GoldenError(ModelError):
    """This host does not reproduce the results of the golden set."""


class FileError(FoveaError, OSError):
    """A file with an image cannot be read, where Fovea runs without a server: there is no request."""

    code: ClassVar[str] = "unreadable_file"

    @classmethod
    def from_os_error(cls, error: OSError) -> FileError:
        """Return the error for the system's refusal."""
        return cls(f"the file cannot be read: {error.strerror or to_one_line(error)}")

    def to_dict(self) -> dict[str, str]:
        """Return the code and the message as plain values, like `RequestError.to_dict`."""
        return {"code": self.code, "message": str(self)}


class RequestError(FoveaError):
    """One request, or one image of it, cannot be answered.

    `status` is the HTTP status, `code` is Fovea's own error code. `retry_after` is the time in seconds after
    which the caller should try again; None if another attempt has no better chance.
    `request_id` is the id of the request in the service's log, in errors that a client of the service raises.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    retry_after: float | None = None
    request_id: str | None = None

    def __init__(self, message: str) -> None:
        """Create the error. A long message is cut, because it may quote input of any length."""
        super().__init__(
            message if len(message) <= _MAX_MESSAGE_LENGTH else f"{message[:_MAX_MESSAGE_LENGTH]}…"
        )

    def to_dict(self) -> dict[str, str]:
        """Return the code and the message for the caller, as plain values."""
        return {"code": self.code, "message": str(self)}


class BadRequest(RequestError):
    """The request is malformed: bad JSON, bad base64, no file, a parameter out of range."""

    status, code = 400, "bad_request"


class NoEmbedding(RequestError):
    """The request asks for the embedding of a model whose graph has none."""

    status, code = 400, "no_embedding"


class BadHttp(RequestError):
    """The received bytes are not HTTP/1.1. Raised by the connection, which is then closed."""

    status, code = 400, "bad_http"


class PacedRefusal:
    """An error that is sent later and later to a caller that gets many such errors."""

    delay: float = 0.0
    """Time in seconds after which the error is sent."""


class Unauthorized(RequestError, PacedRefusal):
    """The request has no API key, or one that is not accepted."""

    status, code = 401, "unauthorized"
    challenge: str = "Bearer"
    """Value of `WWW-Authenticate` (RFC 6750, section 3)."""

    def __init__(self, message: str, *, has_key: bool = False) -> None:
        """Create the error; `has_key` if the request has a key that is not accepted."""
        super().__init__(message)
        self.challenge = 'Bearer realm="fovea"' + (', error="invalid_token"' if has_key else "")


class Forbidden(RequestError):
    """The request needs a feature that is switched off."""

    status, code = 403, "forbidden"


class MissingScope(Forbidden, PacedRefusal):
    """The API key of the request does not open this route."""

    code = "missing_scope"
    challenge: str = "Bearer"
    """Value of `WWW-Authenticate` (RFC 6750, section 3)."""

    def __init__(self, message: str, *, scope: str) -> None:
        """Create the error; `scope` is the scope that the route needs."""
        super().__init__(message)
        self.challenge = f'Bearer realm="fovea", error="insufficient_scope", scope="{scope}"'


class CertificateRequired(RequestError):
    """The client has no certificate, although FOVEA_TLS_CLIENT_CA is set. Raised by the connection."""

    status, code = 403, "certificate_required"


class NotFound(RequestError):
    """There is nothing at this path."""

    status, code = 404, "not_found"


class UploadNotFound(NotFound):
    """The image of an `upload:` URL is not kept here, or not any more."""

    code = "upload_not_found"


class ModelNotFound(NotFound):
    """No model, or no version of the model, has this name."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but does not support the method."""

    status, code = 405, "method_not_allowed"


class BodyTimeout(RequestError):
    """The body did not arrive within the time limit, in seconds."""

    status, code = 408, "body_timeout"

    def __init__(self, limit: float) -> None:
        super().__init__(f"the body did not arrive within {limit:g} s (FOVEA_BODY_TIMEOUT)")


class HeaderTimeout(RequestError):
    """The headers did not arrive within the time limit. Raised by the connection, which is then closed."""

    status, code = 408, "header_timeout"


class SwapRefused(RequestError):
    """A model version did not pass its checks; the previous version is still served."""

    status, code = 409, "swap_refused"


class BodyTooLarge(RequestError):
    """The body has or declares more bytes than the limit. Raised before the rest of the body is read."""

    status, code = 413, "body_too_large"


class TooManyPixels(RequestError):
    """The image header declares more pixels than the limit. Raised before any pixel is decoded."""

    status, code = 413, "too_many_pixels"


class UnsupportedFormat(RequestError):
    """The bytes are not an image, or are an image of an unsupported format."""

    status, code = 415, "unsupported_format"


class BadImage(RequestError):
    """The image has a supported format, but is truncated, corrupt, or of a mode without a conversion rule."""

    status, code = 422, "bad_image"


class BadBox(RequestError):
    """A box is empty or not inside its image."""

    status, code = 422, "bad_box"


class UrlNotAllowed(RequestError):
    """The guard does not allow the URL of an image: its host, its address or its form."""

    status, code = 403, "url_refused"


class UrlUnavailable(RequestError):
    """The host of an image's URL did not give the image."""

    status, code = 424, "url_failed"


class UrlTimeout(UrlUnavailable):
    """The host of an image's URL took longer than FOVEA_URL_SECONDS."""

    code = "url_timeout"


class HeaderTooLarge(RequestError):
    """The request line and headers have more bytes than the limit. Raised by the connection."""

    status, code = 431, "header_too_large"


class Unavailable(RequestError):
    """The service cannot answer now, and the caller should try again after `retry_after` seconds."""

    status = 503
    retry_after: float

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class NotReady(Unavailable):
    """The process or the model that would answer is missing now, and is being started again."""

    code = "not_ready"


class Draining(Unavailable):
    """The service is stopping; another instance, or this one after its restart, will take the request."""

    code = "draining"


class CallerLimited(Unavailable, PacedRefusal):
    """The caller of the request has reached a limit that holds for each caller."""

    status = 429


class RateLimited(CallerLimited):
    """The caller has sent more images per second than one caller may."""

    code = "rate_limited"


class TooManyInFlight(CallerLimited):
    """The caller has as many images in flight as one caller may have."""

    code = "too_many_in_flight"


class ShareExceeded(CallerLimited):
    """The queue is half full, and the caller has more than its share of the places."""

    code = "share_exceeded"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was available."""

    status, code = 504, "deadline_exceeded"


class Internal(RequestError):
    """A bug in Fovea. The caller gets only the request id; the log has the trace."""

    status, code = 500, "internal"


def error_from_dict(values: dict[str, str]) -> RequestError:
    """Return the error from which `to_dict` made these values.

    An error that no explaining process or runner should raise becomes `Internal`.
    """
    error_types = {kind.code: kind for kind in _IMAGE_ERRORS}
    return error_types.get(values["code"], Internal)(values["message"])


def restore_request_error(code: str, message: str) -> RequestError | None:
    """Return the error that a service described with this code and message; None for an unknown code.

    The caller sets `retry_after`, which is not in the body of the reply.
    """
    for error_type in _iterate_subclasses(RequestError):
        if error_type.__dict__.get("code") == code:
            error = error_type.__new__(error_type, message)  # a constructor may take other parameters
            error.retry_after = None
            return error
    return None


_IMAGE_ERRORS = (
    BadRequest,
    NoEmbedding,
    NotFound,
    TooManyPixels,
    UnsupportedFormat,
    BadImage,
    BadBox,
    DeadlineExceeded,
    Internal,
)


def list_error_codes() -> list[str]:
    """Return the codes of all errors that a request can get."""
    return sorted({kind.code for kind in _iterate_subclasses(RequestError) if hasattr(kind, "code")})


def _iterate_subclasses(error_type: type[RequestError]) -> Iterator[type[RequestError]]:
    for child in error_type.__subclasses__():
        yield child
        yield from _iterate_subclasses(child)
