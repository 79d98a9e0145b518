"""The interface of a protocol: an adapter parses requests into images, and a format renders their results.

`service.api.endpoint` does the rest: admission, limits, deadlines, jobs, stage times and errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import orjson
from starlette.datastructures import QueryParams

from fovea.service.api import bodies
from fovea.service.api.options import refuse_native_options
from fovea.service.api.url_images import FetchUrl, refuse_url
from fovea.service.errors import RequestError
from fovea.service.http.fast_path import JSON_MEDIA_TYPE, Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.batch_messages import Image, Item
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings

_NO_HEADERS: Final[Mapping[str, str]] = {}


class Reply(NamedTuple):
    """A complete HTTP reply."""

    content: bytes
    headers: Mapping[str, str] = _NO_HEADERS
    media_type: str = JSON_MEDIA_TYPE

    @classmethod
    def from_value(cls, value: Any) -> Reply:
        """Return a reply with plain values as JSON; NaN becomes null, because JSON has no NaN."""
        return cls(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True)
class InferenceRequest:
    """A request with its whole body."""

    body: bodies.RawBody
    headers: Headers
    options: Any
    """Options of the query, as the route's endpoint has parsed them."""
    model: LiveModel
    settings: Settings
    record: RequestRecord
    fetch_url: FetchUrl = refuse_url
    """Function that fetches an image by its URL."""
    count_images: Callable[[int], None] = lambda count: None
    """Function that counts images before they are fetched (`Admission.count_images`)."""

    @property
    def content_type(self) -> bytes:
        """Content type, empty if there is none."""
        return self.headers.get(b"content-type", b"")


class ReplyFormat(Protocol):
    """The content of a reply, as a request asks for it."""

    @property
    def labels_per_image(self) -> int:
        """Number of labels per image in the reply; a reply with many labels is rendered in a thread."""

    def render(self, results: Sequence[Any], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results of a request in the order of its images.

        `results` has `Classification`s only, unless the adapter has `reports_each_image`: then a
        `RequestError` may stand in place of a result. `model` has classified the images, and `record` has
        the stage times so far. Called once, after all jobs of the request are over, on the event loop or
        in a thread.
        """


class ParsedRequest(NamedTuple):
    """A parsed request: the images, and the format of the reply to them."""

    images: list[Item]
    reply_format: ReplyFormat
    time_limit: float | None = None
    """Time limit for the answer in seconds, if the body sets one."""
    failures: Mapping[int, RequestError] = {}
    """Errors of images that could not be fetched, by the place that they have among the results."""
    result_count: int | None = None
    """Number of images for which the request counts, if boxes make it more than the images."""


class ProtocolAdapter(ABC):
    """A parser of the requests of one route."""

    reports_each_image: ClassVar[bool] = False
    """True if a reply tells the error and the warnings of each image. Otherwise the first error is the answer
    to the whole request, and the warnings are in a header."""

    def parse_options(self, query: bytes) -> Any:
        """Parse the query of a URL; the result is cached with the URL.

        Raises `BadRequest`. By default a protocol has no options of its own.
        """
        refuse_native_options(QueryParams(query))

    def is_json_body(self, headers: Headers) -> bool:
        """Return True if orjson parses the body, which then has a smaller size limit."""
        return bodies.is_json(headers.get(b"content-type", b""))

    def choose_raw_format(self, options: Any, headers: Headers, model: LiveModel) -> ReplyFormat | None:
        """Return the format of the reply to a body that is one raw image, or None for any other body.

        Usually called before the body arrives. A raw image needs no task and no parsing. Raises `BadRequest`.
        """
        return None

    def create_item(self, image: Image, reply_format: ReplyFormat) -> Item:
        """Return the entry of a batch for one raw image; a protocol may add options of its format."""
        return image

    @abstractmethod
    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        """Parse a request whose body is no raw image; slow work belongs into a thread.

        Raises `RequestError`.
        """
