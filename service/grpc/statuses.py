"""Status codes of gRPC for the errors of the service."""

from __future__ import annotations

import math
from typing import Final

import grpc

from fovea.service.errors import MissingScope, RequestError, TooManyPixels, Unauthorized, Unavailable

_STATUSES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    431: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status codes by HTTP status."""

Metadata = tuple[tuple[str, str], ...]


def find_status(error: RequestError) -> grpc.StatusCode:
    """Return the status code of an error.

    An image with too many pixels is an invalid argument: `RESOURCE_EXHAUSTED` would ask for another attempt.
    """
    if isinstance(error, TooManyPixels):
        return grpc.StatusCode.INVALID_ARGUMENT
    return _STATUSES.get(error.status, grpc.StatusCode.UNKNOWN)


def make_trailers(request_id: str, error: RequestError | None = None) -> Metadata:
    """Return the metadata after an answer: the request id, and an error's code and delay.

    `retry-after` is in seconds, as over HTTP. `grpc-retry-pushback-ms` tells the same to the retry policies
    of gRPC's own clients.
    """
    trailers: Metadata = (("x-request-id", request_id),)
    if error is not None:
        trailers += (("code", error.code),)
        if isinstance(error, Unauthorized | MissingScope):
            trailers += (("www-authenticate", error.challenge),)
        if isinstance(error, Unavailable):
            seconds = max(1, math.ceil(error.retry_after))
            trailers += (("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(1000 * seconds)))
    return trailers
