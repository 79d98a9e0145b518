"""The route that keeps an image for questions (`service.api.uploads`)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest
from fovea.service.api.asgi_endpoint import AsgiEndpoint, DisconnectGuard
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.protocol_routes import RAW_IMAGE_CONTENT, add_endpoint_route
from fovea.service.api.reply_schemas import ErrorReply, UploadReply, build_error_responses
from fovea.service.api.request_schemas import UploadRequest
from fovea.service.api.services import Services
from fovea.service.api.uploads import MAX_IDLE_SECONDS
from fovea.service.errors import BadRequest, BodyTooLarge
from fovea.service.http.api_protocol import NATIVE
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_context import get_context, get_record
from fovea.service.runners.batch_messages import Image
from fovea.service.serving.admission import Admission, hold_body


class UploadEndpoint(AsgiEndpoint):
    """The application of the route that keeps an image. It needs no model, and admits no work."""

    def parse_options(self, query: bytes) -> None:
        """Raise `BadRequest` for a query, because there are no options."""
        if query:
            raise BadRequest("this call has no options")

    def body_limit(self, headers: Headers) -> bodies.BodyLimit:
        limit = super().body_limit(headers)
        max_bytes = self.services.url_images.uploads.max_bytes
        return limit if limit.max_bytes <= max_bytes else bodies.BodyLimit(max_bytes, "FOVEA_BODIES_BYTES")

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> Response:
        services, record = self.services, get_record(scope)
        refusal = get_context(scope).target.refusal
        if refusal:
            raise refusal
        services.lifecycle.require_accepting()
        headers = dict(scope["headers"])
        limit = self.body_limit(headers)
        bodies.check_length(headers, limit)
        caller = services.reserve_caller(record)
        try:
            with ExitStack() as stack:

                def reserve(size: int) -> None:
                    if caller:
                        caller.add_bytes(size, services.classifier.body_memory)
                    stack.enter_context(hold_body(services.classifier, size))

                raw_body = await bodies.read_body(receive, services.settings, reserve, limit)
                encoding = headers.get(b"content-encoding", b"identity")
                raw_body = await bodies.decompress_body(raw_body, encoding, limit, reserve)
                if bodies.is_json(headers.get(b"content-type", b"")):
                    request = await parse_json(raw_body, lambda value: validate_json(UploadRequest, value))
                    image: Image
                    with DisconnectGuard(get_context(scope)):
                        image = await services.url_images.bind(reserve, record)(request.url)
                else:
                    image = raw_body.to_image()
        finally:
            if caller:
                caller.release()
        if not isinstance(image, bytes):
            raise TypeError(f"a body over ASGI must be bytes, and is {type(image).__name__}")
        uploads = services.url_images.uploads
        if len(image) > uploads.max_bytes:  # it was fetched
            raise BodyTooLarge(
                f"the image has {len(image)} bytes; at most {uploads.max_bytes} are kept (FOVEA_BODIES_BYTES)"
            )
        url = await uploads.add_image(image, record.caller)
        if url is None:
            raise services.classifier.create_overload_error("there is no memory to keep this image now")
        reply = {"url": url, "bytes": len(image), "seconds": MAX_IDLE_SECONDS}
        return Response(orjson.dumps(reply), media_type="application/json")

    async def answer_body(
        self, request: InferenceRequest, admission: Admission, deadline: float, send: Send
    ) -> Response | None:
        raise NotImplementedError("an upload has no admission")


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the route that keeps images."""
    responses: dict[int | str, dict[str, Any]] = {
        code: response
        for code, response in build_error_responses(ErrorReply).items()
        if code in (400, 403, 408, 413, 424, 429, 500, 503, 504)
    }
    add_endpoint_route(
        app,
        "/v1/images",
        UploadEndpoint(services, NATIVE),
        content={**RAW_IMAGE_CONTENT, "application/json": {"schema": UploadRequest.model_json_schema()}},
        methods=("POST", "PUT"),
        tags=["images"],
        summary="Keep an image for questions",
        description=(
            "Keep an image for ten minutes after the last question about it. Other calls take its `url` in "
            'JSON, `{"images": [{"url": "upload:…"}]}`. If they answer 404 `upload_not_found`, send the '
            'image again. The JSON `{"url": "https://…"}` lets the service fetch the image, if '
            "FOVEA_URL_HOSTS lists its host."
        ),
        response_model=UploadReply,
        responses=responses,
    )
