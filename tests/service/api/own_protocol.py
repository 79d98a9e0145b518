"""A server with a protocol of its own: `python -m tests.service.api.own_protocol`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fastapi import FastAPI

from fovea.service import __main__ as program
from fovea.service import app as application
from fovea.service import settings
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, Reply
from fovea.service.api.base64_text import from_base64
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.protocol_routes import ProtocolRoutes
from fovea.service.api.reply_schemas import FlatError
from fovea.service.api.request_schemas import StrictModel
from fovea.service.api.services import Services
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import rank_labels

PROTOCOL: Final = ApiProtocol("own", render_flat_error)


class EncodedImages(StrictModel):
    """A request in JSON: images, as base64."""

    images: list[str]


class BestLabels(NamedTuple):
    """A reply of text: the best label of each image in a line."""

    labels_per_image: int = 1

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        lines = [rank_labels(one, top_k=1)[0].label + "\n" for one in results]
        return Reply("".join(lines).encode(), media_type="text/plain")


class LabelAdapter(ProtocolAdapter):
    """The parser of the requests."""

    def choose_raw_format(self, options: None, headers: Headers, model: LiveModel) -> BestLabels | None:
        return None if self.is_json_body(headers) else BestLabels()

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        def convert_value(value: Any) -> ParsedRequest:
            images = validate_json(EncodedImages, value).images
            return ParsedRequest([from_base64(one, "images") for one in images], BestLabels())

        return await parse_json(request.body, convert_value)


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    routes = ProtocolRoutes(app, services, PROTOCOL, FlatError)
    routes.add_endpoint("/label/{name}", LabelAdapter(), summary="Best label", reply_type=str)


if __name__ == "__main__":
    vars(settings)["PROTOCOLS"] = (*settings.PROTOCOLS, PROTOCOL.name)
    vars(application)["_OTHER_PROTOCOLS"] = (sys.modules[__name__],)
    sys.exit(program.main())
