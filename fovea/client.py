"""A client of the service, synchronous and asynchronous, with the results of a model in this process."""

from __future__ import annotations

import math
import os
import ssl
import time
from collections.abc import Iterable, Mapping
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from fovea.errors import AnswerTimeout, ConnectionFailed
from fovea.http_calls import ClassifyCall, Sleep, Steps, send_with_retries
from fovea.images import BoxList, ImageError, ImageSource
from fovea.results import Result
from fovea.retries import Retries
from fovea.service.errors import Unavailable, to_one_line

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS: Final = 5.0
"""Limit on the time to connect, in seconds."""


def import_httpx() -> ModuleType:
    """Return the package httpx, which only the clients need. Raises `ImportError` without it."""
    try:
        import httpx
    except ImportError:
        raise ImportError(_MISSING_PACKAGE, name="httpx") from None
    return httpx


_MISSING_PACKAGE: Final = "the client needs a package: pip install httpx"


class _ClientOptions:
    """The options of a client, and what both kinds of client do with them."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout: float = 60.0,
        retry_seconds: float = 30.0,
        batch_size: int = 16,
        headers: Mapping[str, str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        certificate: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
    ) -> None:
        """Create a client for the service at `url`. It connects with the first call.

        A request ends after `timeout` seconds without an answer. Replies 429 and 503 and failed connections
        are retried, each request for `retry_seconds` at most; 0 for no retry. A list of images is sent
        `batch_size` images at a time. `headers` go with every request, for proxies that ask for a key.

        `ca` is a PEM file with the authority of the service's certificate, in place of public authorities.
        `certificate` names the PEM files of the client's own certificate and of its key, for a service with
        FOVEA_TLS_CLIENT_CA.

        Raises `ImportError` without httpx, and `ValueError` for a value out of range or a file that cannot be
        used.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; it must start with http:// or https://")
        for name, value in (("timeout", timeout), ("batch_size", batch_size)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be more than 0, and finite")
        if not 0 <= retry_seconds < math.inf:
            raise ValueError(f"retry_seconds is {retry_seconds}; it must be at least 0, and finite")
        self.url = url
        self._timeout = timeout
        self._retry_seconds = retry_seconds
        self._batch_size = batch_size
        self._headers = dict(headers or {})
        self._ca = ca
        self._certificate = certificate
        self._is_closed = False
        self._open_http()

    def _open_http(self) -> None:
        """Create the httpx client of this process, which has no connections yet."""
        httpx = import_httpx()
        try:
            self._http: Any = self._get_http_type()(
                base_url=self.url,
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
                headers=self._headers,
                verify=self._create_tls(),
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"url is {self.url!r}: {error}") from None
        self._pid = os.getpid()

    def _create_tls(self) -> ssl.SSLContext | bool:
        """Return how https is spoken: a context with the given files, or True for httpx's own way."""
        if self._ca is None and self._certificate is None:
            return True
        context: ssl.SSLContext = import_httpx().create_ssl_context()
        try:
            if self._ca is not None:
                context = ssl.create_default_context(cafile=self._ca)
            if self._certificate is not None:
                context.load_cert_chain(*self._certificate)
        except OSError as error:
            reason = error.strerror or to_one_line(error)
            raise ValueError(f"ca is {self._ca}, certificate is {self._certificate}: {reason}") from None
        return context

    def _get_http_type(self) -> type[httpx.Client | httpx.AsyncClient]:
        raise NotImplementedError

    def _get_http(self) -> Any:
        """Return the httpx client of this process. A forked child must not use its parent's connections."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        if self._pid != os.getpid():
            self._open_http()
        return self._http

    def _classify(
        self,
        http: httpx.Client | httpx.AsyncClient,
        images: Any,
        top_k: int,
        coverage: float | None,
        embedding: bool,
        boxes: Any,
        on_error: Literal["raise", "return"],
        model: str | None,
        version: str | int | None,
    ) -> Steps:
        call = ClassifyCall(
            images,
            top_k,
            coverage,
            embedding,
            boxes,
            on_error,
            model,
            version,
            self._batch_size,
            self._timeout,
            self._retry_seconds,
        )
        return call.run(http.build_request)

    def _check_ready(self, http: httpx.Client | httpx.AsyncClient) -> Steps:
        try:
            yield from send_with_retries(lambda: http.build_request("GET", "health/ready"), Retries(0))
        except (Unavailable, ConnectionFailed, AnswerTimeout):
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the options, not the connections."""
        return {**self.__dict__, "_http": None, "_pid": 0}

    def __repr__(self) -> str:
        """Return the kind of client and its address."""
        return f"<{type(self).__name__} {self.url}>"


class Client(_ClientOptions):
    """A client of the service. It may be used from several threads at once.

    `close`, or the end of a `with` block, closes its connections:

        with fovea.Client("http://127.0.0.1:8000") as client:
            print(client.classify("cat.jpg").label)
    """

    def _get_http_type(self) -> type[httpx.Client]:
        http_type: type[httpx.Client] = import_httpx().Client
        return http_type

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> Result: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> Result | ImageError: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result | ImageError]: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result]: ...

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result] | ImageError: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[list[Result]]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[list[Result] | ImageError]: ...

    def classify(
        self,
        images: Any,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Any = None,
        on_error: Literal["raise", "return"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> Any:
        """Classify one image, or each image of a list; return a `Result`, or a list of results.

        Images, `top_k`, `coverage`, `embedding`, `boxes` and `on_error` are those of `Model.classify`. Each
        image with boxes is a request of its own. `model` and `version` choose a model of the service; by
        default its default model and the latest version.

        Raises `FileError` and `RequestError` like `Model.classify`, also `ModelNotFound`, and `Unavailable`
        if the service was too busy for as long as the client tried. Raises `ConnectionFailed`,
        `AnswerTimeout`, and `UnexpectedReply` for a reply that is not Fovea's. These errors concern the
        whole call, and are raised in any case.
        """
        http: httpx.Client = self._get_http()
        steps = self._classify(http, images, top_k, coverage, embedding, boxes, on_error, model, version)
        return self._run(http, steps)

    def ready(self) -> bool:
        """Return whether the service can classify now. Raises `UnexpectedReply` if it is not Fovea."""
        http: httpx.Client = self._get_http()
        is_ready: bool = self._run(http, self._check_ready(http))
        return is_ready

    def _run(self, http: httpx.Client, steps: Steps) -> Any:
        """Perform the steps of a call, and return its result."""
        value: Any = None
        error: Exception | None = None
        while True:
            try:
                step = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as end:
                return end.value
            value = error = None
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
            elif callable(step):
                value = step()
            else:
                try:
                    value = http.send(step)
                except Exception as failure:
                    error = failure

    def close(self) -> None:
        """Close the connections. The client cannot be used any more."""
        http, self._http, self._is_closed = self._http, None, True
        if http is not None and self._pid == os.getpid():
            http.close()

    def __enter__(self) -> Client:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()


class AsyncClient(_ClientOptions):
    """An asynchronous client of the service, for asyncio.

    `aclose`, or the end of an `async with` block, closes its connections:

        async with fovea.AsyncClient("http://127.0.0.1:8000") as client:
            print((await client.classify("cat.jpg")).label)
    """

    def _get_http_type(self) -> type[httpx.AsyncClient]:
        http_type: type[httpx.AsyncClient] = import_httpx().AsyncClient
        return http_type

    @overload
    async def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> Result: ...

    @overload
    async def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> Result | ImageError: ...

    @overload
    async def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result]: ...

    @overload
    async def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: None = None,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result | ImageError]: ...

    @overload
    async def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result]: ...

    @overload
    async def classify(  # type: ignore[overload-overlap]  # a path is an iterable of strings
        self,
        images: ImageSource,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: BoxList,
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[Result] | ImageError: ...

    @overload
    async def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["raise"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[list[Result]]: ...

    @overload
    async def classify(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Iterable[BoxList],
        on_error: Literal["return"],
        model: str | None = None,
        version: str | int | None = None,
    ) -> list[list[Result] | ImageError]: ...

    async def classify(
        self,
        images: Any,
        *,
        top_k: int = 5,
        coverage: float | None = None,
        embedding: bool = False,
        boxes: Any = None,
        on_error: Literal["raise", "return"] = "raise",
        model: str | None = None,
        version: str | int | None = None,
    ) -> Any:
        """Classify one image, or each image of a list; return a `Result`, or a list of results.

        Images, `top_k`, `coverage`, `embedding`, `boxes` and `on_error` are those of `Model.classify`. Each
        image with boxes is a request of its own. `model` and `version` choose a model of the service; by
        default its default model and the latest version.

        Raises `FileError` and `RequestError` like `Model.classify`, also `ModelNotFound`, and `Unavailable`
        if the service was too busy for as long as the client tried. Raises `ConnectionFailed`,
        `AnswerTimeout`, and `UnexpectedReply` for a reply that is not Fovea's. These errors concern the
        whole call, and are raised in any case.
        """
        http: httpx.AsyncClient = self._get_http()
        steps = self._classify(http, images, top_k, coverage, embedding, boxes, on_error, model, version)
        return await self._run(http, steps)

    async def ready(self) -> bool:
        """Return whether the service can classify now. Raises `UnexpectedReply` if it is not Fovea."""
        http: httpx.AsyncClient = self._get_http()
        is_ready: bool = await self._run(http, self._check_ready(http))
        return is_ready

    async def _run(self, http: httpx.AsyncClient, steps: Steps) -> Any:
        """Perform the steps of a call, and return its result."""
        import anyio

        value: Any = None
        error: Exception | None = None
        while True:
            try:
                step = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as end:
                return end.value
            value = error = None
            if isinstance(step, Sleep):
                await anyio.sleep(step.seconds)
            elif callable(step):
                value = await anyio.to_thread.run_sync(step)
            else:
                try:
                    value = await http.send(step)
                except Exception as failure:
                    error = failure

    async def aclose(self) -> None:
        """Close the connections. The client cannot be used any more."""
        http, self._http, self._is_closed = self._http, None, True
        if http is not None and self._pid == os.getpid():
            await http.aclose()

    async def __aenter__(self) -> AsyncClient:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.aclose()
