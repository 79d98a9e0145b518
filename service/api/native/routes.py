"""The native protocol: `/v1/classify`, the list of models and their contracts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, ReplyFormat
from fovea.service.api.body_parser import needs_parsing, parse_body
from fovea.service.api.endpoint import Endpoint
from fovea.service.api.native.classification_replies import ReplyOptions, resolve_options
from fovea.service.api.options import SEVERAL_IMAGES_WITH_BOXES, parse_query
from fovea.service.api.protocol_routes import add_endpoint_route
from fovea.service.api.reply_schemas import CLASSIFY_RESPONSES, ModelList
from fovea.service.api.request_schemas import ClassifyOptions, build_request_content
from fovea.service.api.services import Services
from fovea.service.api.url_images import fetch_images
from fovea.service.errors import BadRequest
from fovea.service.http.api_protocol import NATIVE
from fovea.service.http.compression import Compressor
from fovea.service.http.fast_path import Headers
from fovea.service.inference.boxes import Boxes
from fovea.service.runners.batch_messages import Image, ImageRequest, Item, count_results
from fovea.service.serving.live_model import LiveModel

_CLASSIFY_ROUTES: Final = {
    "default": ("/v1/classify", "the default model"),
    "name": ("/v1/models/{name}/classify", "the newest version of a model"),
    "version": ("/v1/models/{name}/versions/{version}/classify", "one version of a model"),
}
"""Path of each classification route, and the model that answers, by the end of the operation's id."""

WithGoldenImages = Annotated[
    bool,
    Query(description="Also return the golden images with their logits, most of the contract's bytes."),
]

_EMPTY_BODY: Final = bodies.ParsedBody([])
"""Body without options of its own."""


class ClassifyAdapter(ProtocolAdapter):
    """A parser of raw images, forms and JSON in Fovea's own form."""

    reports_each_image = True

    def parse_options(self, query: bytes) -> ClassifyOptions:
        return parse_query(ClassifyOptions, query)

    def is_json_body(self, headers: Headers) -> bool:
        return False  # pydantic parses the JSON

    def choose_raw_format(
        self, options: ClassifyOptions, headers: Headers, model: LiveModel
    ) -> ReplyOptions | None:
        # An image with boxes counts as several, for which only `parse_request` has a way.
        if options.boxes is not None or needs_parsing(headers.get(b"content-type", b"")):
            return None
        return resolve_options(options, _EMPTY_BODY, model)

    def create_item(self, image: Image, reply_format: ReplyFormat) -> Item:
        wants_embedding = isinstance(reply_format, ReplyOptions) and reply_format.embedding
        return ImageRequest(image, include_embedding=True) if wants_embedding else image

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        parsed_body = await parse_body(request.content_type, request.body, request.settings)
        reply_options = resolve_options(request.options, parsed_body, request.model)
        boxes = _resolve_boxes(request.options, parsed_body)
        if parsed_body.urls:
            request.count_images(len(parsed_body.images))  # before the service fetches them
        failures = await fetch_images(parsed_body.images, parsed_body.urls, request.fetch_url)
        if failures:
            boxes = [one for index, one in enumerate(boxes) if index not in failures]
        images = [image for index, image in enumerate(parsed_body.images) if index not in failures]
        if not boxes:
            items = [self.create_item(image, reply_options) for image in images]
            return ParsedRequest(items, reply_options, failures=failures)
        items = [
            ImageRequest(image, include_embedding=reply_options.embedding, boxes=image_boxes)
            for image, image_boxes in zip(images, boxes, strict=True)
        ]
        result_count = sum(map(count_results, items))
        bodies.check_image_count(result_count, request.settings, "boxes and images without boxes")
        return ParsedRequest(items, reply_options, failures=failures, result_count=result_count)


def _resolve_boxes(options: ClassifyOptions, body: bodies.ParsedBody) -> Sequence[Boxes | None]:
    """Return the boxes of each image, or nothing if no image has any. Those of the body take precedence.

    Raises `BadRequest` for boxes in the query for several images.
    """
    if body.boxes or options.boxes is None:
        return body.boxes
    if len(body.images) > 1:
        raise BadRequest(SEVERAL_IMAGES_WITH_BOXES)
    return (options.boxes,)


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the native routes."""
    classifier = services.classifier
    endpoint = Endpoint(services, ClassifyAdapter(), NATIVE)
    for suffix, (path, model) in _CLASSIFY_ROUTES.items():
        add_endpoint_route(
            app,
            path,
            endpoint,
            content=build_request_content(services.example_image),
            operation=f"classify_by_{suffix}",
            query_type=ClassifyOptions,
            tags=["classify"],
            summary="Classify images",
            description=f"Classify one image or several with {model}.",
            response_model=None,
            responses=CLASSIFY_RESPONSES,
        )

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> dict[str, Any]:
        """List the models that are loaded, the resting models, and the refused versions.

        A resting model is loaded by the first request for it. A refused version did not pass its checks.
        `versions` lists every version with its state.
        """
        catalog = classifier.catalog
        loaded = [
            {
                "name": model.name,
                "version": model.version,
                "task": model.contract.task,
                "labels": len(model.contract.labels),
                "default": model.name == catalog.default,
                "embedding": {"dimension": model.embedding.dimension} if model.embedding else None,
            }
            for model in catalog.models
        ]
        resting = [{"name": found.name, "version": found.version} for found in catalog.on_demand_versions]
        refused = [
            {"name": one.name, "version": one.version, "reason": one.reason}
            for one in catalog.refused_versions
        ]
        versions = [{**one._asdict(), "since": _format_time(one.since)} for one in catalog.list_statuses()]
        return {"models": loaded, "resting": resting, "refused": refused, "versions": versions}

    compressor = Compressor()

    async def get_contract(
        request: Request, name: str, version: str | None, *, has_golden_images: bool
    ) -> Response:
        model = await services.get_model(name, version)
        document = model.load_result.contract_json
        if not has_golden_images:
            document = await model.read_short_contract()
        return await compressor.create_response(request.scope, document.encode(), "application/json")

    route_options: dict[str, Any] = {
        "response_model": dict[str, Any],
        "responses": {code: CLASSIFY_RESPONSES[code] for code in (400, 404)},
        "tags": ["models"],
    }

    @app.get("/v1/models/{name}/contract", **route_options)
    async def contract_of_model(request: Request, name: str, golden: WithGoldenImages = False) -> Response:
        """Return the contract of the newest version of a model."""
        return await get_contract(request, name, None, has_golden_images=golden)

    @app.get("/v1/models/{name}/versions/{version}/contract", **route_options)
    async def contract_of_version(
        request: Request, name: str, version: str, golden: WithGoldenImages = False
    ) -> Response:
        """Return the contract of one version of a model."""
        return await get_contract(request, name, version, has_golden_images=golden)


def _format_time(seconds: float) -> str:
    """Format a time in seconds since 1970 by ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
