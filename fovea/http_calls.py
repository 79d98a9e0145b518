"""The steps of the calls to a service, without the sending: `Client` and `AsyncClient` share them.

A call is a generator. It yields a request, a time to sleep, or a function to run, and gets the response or
the function's result back. The client only performs the steps, with or without `await`. httpx writes its
authentication flows in the same way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from urllib.parse import quote

from fovea.errors import AnswerTimeout, ConnectionFailed, UnexpectedReply
from fovea.images import ImageError, check_on_error, encode_source, list_boxes, list_images, name_error
from fovea.results import Result
from fovea.retries import RETRIED_STATUSES, Retries, parse_retry_after
from fovea.service.errors import (
    BadBox,
    BadImage,
    BadRequest,
    BodyTooLarge,
    FileError,
    FoveaError,
    Internal,
    RequestError,
    TooManyPixels,
    Unauthorized,
    UnsupportedFormat,
    restore_request_error,
    to_one_line,
)

if TYPE_CHECKING:
    import httpx

    from fovea.service.inference.boxes import Boxes

_MAX_BODY_BYTES: Final = 1 << 30
"""Largest value of the service's limit for a body, in bytes. A larger file is not sent."""

_MAX_BATCH_BYTES: Final = 16 << 20
"""Size in bytes from which a batch gets no further image: a quarter of the default of FOVEA_BODY_BYTES."""

_IMAGE_ERRORS: Final = (BadBox, BadImage, BodyTooLarge, Internal, TooManyPixels, UnsupportedFormat)
"""Errors that belong to the image if they answer a request with a single image."""

KEY_VARIABLE: Final = "FOVEA_KEY"
"""Environment variable with the API key of a client."""

_VALID_KEY: Final = re.compile(r"[\x21-\x7e]{1,512}")

_MAX_QUOTE_LENGTH: Final = 200
"""Number of characters of an unexpected reply that a message quotes."""


def read_key_header(key: str | None = None) -> dict[str, str]:
    """Return the header with an API key, by default that of FOVEA_KEY; no header without a key.

    Raises `ValueError` for a key that no service accepts. The message does not quote it.
    """
    name = "key" if key is not None else KEY_VARIABLE
    value = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
    if not value and key is None:
        return {}
    if not _VALID_KEY.fullmatch(value):
        raise ValueError(
            f"{name} is not an API key; a key has 1 to 512 visible ASCII characters, without spaces"
        )
    return {"Authorization": f"Bearer {value}"}


@dataclass(frozen=True)
class Sleep:
    """The step of waiting for `seconds`."""

    seconds: float


Step: TypeAlias = "httpx.Request | Sleep | Callable[[], Any]"
Steps: TypeAlias = Generator[Step, Any, Any]
MakeRequest: TypeAlias = "Callable[..., httpx.Request]"
"""`build_request` of an httpx client."""


@dataclass(frozen=True)
class ClassifyCall:
    """The arguments of a call of `classify`."""

    images: Any
    top_k: int
    coverage: float | None
    embedding: bool
    boxes: Any
    on_error: Literal["raise", "return"]
    model: str | None
    version: str | int | None
    batch_size: int
    timeout: float
    retry_seconds: float

    def run(self, make_request: MakeRequest) -> Steps:
        """Send the images in batches; return a result, or a list of results and errors."""
        sources, is_single = list_images(self.images)
        check_on_error(self.on_error)
        path = _classify_path(self.model, self.version)
        box_lists = (
            None if self.boxes is None else list_boxes(self.boxes, None if is_single else len(sources))
        )
        results: list[Result | list[Result] | ImageError] = []
        while len(results) < len(sources):
            boxes = None if box_lists is None else box_lists[len(results)]
            # The boxes in a query are those of one image.
            batch_size = self.batch_size if boxes is None else 1
            batch = sources[len(results) : len(results) + batch_size]
            # Reading and encoding take time: the asynchronous client does it in a thread.
            outcomes = yield partial(_encode_batch, batch)
            positions = [index for index, one in enumerate(outcomes) if isinstance(one, bytes)]
            answers = yield from self._send_batch(
                [outcomes[index] for index in positions], boxes, path, make_request
            )
            for index, answer in zip(positions, answers, strict=True):
                outcomes[index] = answer
            for index, outcome in enumerate(outcomes, len(results)):
                if self.on_error == "raise" and isinstance(outcome, RequestError | FileError):
                    raise name_error(outcome, sources[index], None if is_single else index)
            results += outcomes
        return results[0] if is_single else results

    def _send_batch(
        self, images: Sequence[bytes], boxes: Boxes | None, path: str, make_request: MakeRequest
    ) -> Steps:
        """Return the results or errors of encoded images. A batch that is too large is sent in two parts.

        With `boxes` there is only one image.
        """
        if not images:
            return []
        options: dict[str, Any] = {"top_k": self.top_k}
        if self.coverage is not None:
            options["coverage"] = self.coverage
        if self.embedding:
            options["embedding"] = True
        if boxes is not None:
            options["boxes"] = json.dumps(boxes, separators=(",", ":"))
        # The service gives up an answer for which this client does not wait any more.
        headers = {"X-Deadline-Ms": f"{max(1, round(1000 * self.timeout))}"}
        body: dict[str, Any] = {"headers": headers}
        if len(images) == 1:
            headers["Content-Type"] = "application/octet-stream"
            body["content"] = images[0]
        else:
            body["files"] = [("image", ("image", image)) for image in images]
        try:
            reply = yield from send_with_retries(
                lambda: make_request("POST", path, params=options, **body),
                Retries(self.retry_seconds),
            )
        except _IMAGE_ERRORS as error:
            if len(images) == 1:
                return [error.with_traceback(None)]  # its frames would keep the images alive
            if not isinstance(error, BodyTooLarge):
                raise
            middle = len(images) // 2
            first_half = yield from self._send_batch(images[:middle], boxes, path, make_request)
            second_half = yield from self._send_batch(images[middle:], boxes, path, make_request)
            return [*first_half, *second_half]
        return _parse_results(reply, len(images), boxes, self.top_k)


def send_with_retries(make_request: Callable[[], httpx.Request], retries: Retries) -> Steps:
    """Send a request until it is answered, and return the reply of status 200.

    Raises `FoveaError`: the error of the reply, or of the connection.
    """
    import httpx

    while True:
        error: FoveaError
        is_connection = False
        try:
            response = yield make_request()
        except httpx.TimeoutException as failure:
            if not isinstance(failure, httpx.ConnectTimeout):
                raise AnswerTimeout(f"the service did not answer in time: {_describe(failure)}") from failure
            error, is_connection = _connection_error(failure), True
        except (httpx.NetworkError, httpx.RemoteProtocolError) as failure:
            error, is_connection = _connection_error(failure), True
        except httpx.HTTPError as failure:  # a request that no attempt can send
            raise _connection_error(failure) from failure
        else:
            if response.status_code == 200:
                return response
            error = read_error(response)
            if response.status_code not in RETRIED_STATUSES:
                raise error
        yield Sleep(retries.next_wait(error, is_connection=is_connection))


def _connection_error(failure: httpx.HTTPError) -> ConnectionFailed:
    error = ConnectionFailed(
        f"no answer from {failure.request.url.copy_with(query=None)}: {_describe(failure)}"
    )
    error.__cause__ = failure
    return error


def _describe(failure: Exception) -> str:
    return to_one_line(failure) or type(failure).__name__


def read_error(response: httpx.Response) -> FoveaError:
    """Return the error that a reply describes."""
    retry_after = parse_retry_after(response.headers.get("Retry-After"))
    try:
        fields = response.json()["error"]
        error = restore_request_error(fields["code"], fields["message"])
    except (ValueError, KeyError, TypeError):
        error = None
    if error is None:
        return _unexpected_reply(response, retry_after)
    if isinstance(error, Unauthorized):
        error.args = (f"{error}; a client takes its key from `key` or {KEY_VARIABLE}",)
    error.retry_after = retry_after
    error.request_id = response.headers.get("X-Request-ID")
    return error


def _unexpected_reply(response: httpx.Response, retry_after: float | None = None) -> UnexpectedReply:
    text = to_one_line(ValueError(response.text[:_MAX_QUOTE_LENGTH]))
    return UnexpectedReply(
        f"status {response.status_code}, and no reply of Fovea: {text!r}",
        status=response.status_code,
        retry_after=retry_after,
    )


def _parse_results(
    response: httpx.Response, count: int, boxes: Boxes | None, top_k: int
) -> list[Result | list[Result] | RequestError]:
    """Return the results and errors of the `count` images of a request. Raises `UnexpectedReply`.

    With `boxes`, the result of the image is a list of as many results.
    """
    try:
        reply = json.loads(response.content)
        replies = reply["results"] if count > 1 else [reply]
        if len(replies) != count:
            raise ValueError(f"{len(replies)} results")
        return [_parse_result(one | {"model": reply["model"]}, boxes, top_k) for one in replies]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unexpected_reply(response) from error


def _parse_result(
    reply: dict[str, Any], boxes: Boxes | None, top_k: int
) -> Result | list[Result] | RequestError:
    if "error" in reply:
        code, message = reply["error"]["code"], reply["error"]["message"]
        return restore_request_error(code, message) or Internal(f"{code}: {message}")
    if boxes is None:
        return Result.from_reply(reply, top_k)
    results = Result.list_from_reply(reply, top_k)
    if [result.box for result in results] != list(boxes):
        raise ValueError("the answers are not those of the boxes")
    return results


def _encode_batch(sources: Sequence[Any]) -> list[bytes | ImageError]:
    """Return the encoded images or their errors: of all sources, or of the first up to a size limit."""
    outcomes: list[bytes | ImageError] = []
    size = 0
    for source in sources:
        try:
            image = encode_source(source, max_bytes=_MAX_BODY_BYTES)
            if not image:  # the service would refuse the whole request
                raise BadRequest("the image is empty")
            outcomes.append(image)
            size += len(image)
        except (RequestError, FileError) as error:
            outcomes.append(error.with_traceback(None))  # its frames would keep the pixels alive
        if size >= _MAX_BATCH_BYTES:
            break
    return outcomes


def _classify_path(model: str | None, version: str | int | None) -> str:
    """Return the path of a classification by a model; by default the default model and latest version."""
    if model is None:
        if version is not None:
            raise ValueError(f"version is {version!r}, but model is missing; name the model")
        return "v1/classify"
    path = f"v1/models/{quote(model, safe='')}"
    return (
        f"{path}/classify" if version is None else f"{path}/versions/{quote(str(version), safe='')}/classify"
    )
