"""Open Inference Protocol v2 over HTTP, as in KServe, Triton, OpenVINO Model Server and MLServer.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{name}[/versions/{version}][/ready | /config | /stats]
    POST /v2/models/{name}[/versions/{version}]/infer

It has the extensions binary_tensor_data, classification, model_configuration and statistics. The extension
model_repository is in `service.api.oip.repository`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI

from fovea.service import __version__
from fovea.service.api.oip.infer import FLOAT_DATATYPE, InferAdapter, list_outputs
from fovea.service.api.oip.schemas import (
    Alternatives,
    InferReply,
    InferRequest,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from fovea.service.api.protocol_routes import RAW_IMAGE_CONTENT, ProtocolRoutes
from fovea.service.api.reply_schemas import FlatError, build_error_responses
from fovea.service.api.services import Services
from fovea.service.api.tensors import DATATYPES, ENCODED_DATATYPE, ModelInputs
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.statistics import DurationSum

PROTOCOL: Final = ApiProtocol("oip", render_flat_error, path_prefix="/v2")

EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)

_PLATFORM: Final = "onnxruntime_onnx"


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    _add_server_routes(app, services)
    _add_model_routes(app, services)
    routes = ProtocolRoutes(app, services, PROTOCOL, FlatError)
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        routes.add_endpoint(
            path,
            InferAdapter(),
            summary="Classify images",
            reply_type=InferReply,
            body_type=InferRequest,
            content=RAW_IMAGE_CONTENT,
            make_example=lambda image: {
                "inputs": [{"name": "image", "shape": [1], "datatype": ENCODED_DATATYPE, "data": [image]}]
            },
        )


def _add_server_routes(app: FastAPI, services: Services) -> None:
    @app.get("/v2", tags=[PROTOCOL.name])
    async def server() -> ServerMetadata:
        """Return the name, the version and the extensions of the service."""
        return ServerMetadata(name="fovea", version=__version__, extensions=list(EXTENSIONS))

    @app.get("/v2/health/live", tags=[PROTOCOL.name], responses={503: build_error_responses(FlatError)[503]})
    async def live() -> ServerLive:
        """Check that the process answers, and has not been without a runner for too long."""
        services.classifier.require_alive()
        return ServerLive(live=True)

    @app.get("/v2/health/ready", tags=[PROTOCOL.name], responses={503: build_error_responses(FlatError)[503]})
    async def ready() -> ServerReady:
        """Check that the models are ready."""
        services.require_ready()
        return ServerReady(ready=True)


def _add_model_routes(app: FastAPI, services: Services) -> None:
    catalog = services.classifier.catalog
    error_responses = build_error_responses(FlatError)
    route_options: dict[str, Any] = {
        "tags": [PROTOCOL.name],
        "responses": {one: error_responses[one] for one in (404, 503)},
    }

    @app.get("/v2/models/stats", tags=[PROTOCOL.name])
    async def all_statistics() -> dict[str, Any]:
        """Return the statistics of all loaded models."""
        services.classifier.metrics.fold()
        return {"model_stats": [render_statistics(model) for model in catalog.models]}

    def add_route(
        path: str, get_reply: Callable[[str, str | None], Any], reply_type: Any, summary: str
    ) -> None:
        async def of_model(name: str) -> Any:
            return await get_reply(name, None)

        async def of_version(name: str, version: str) -> Any:
            return await get_reply(name, version)

        for model_path, handler in (("{name}", of_model), ("{name}/versions/{version}", of_version)):
            suffix = handler.__name__
            app.get(
                f"/v2/models/{model_path}{path}",
                response_model=reply_type,
                summary=summary,
                operation_id=f"{PROTOCOL.name}_{path.strip('/') or 'metadata'}_{suffix}",
                **route_options,
            )(handler)

    async def get_metadata(name: str, version: str | None) -> ModelMetadata:
        return render_metadata(
            await services.get_model(name, version),
            [one.version or "" for one in catalog.list_versions(name)],
        )

    async def check_ready(name: str, version: str | None) -> ModelReady:
        catalog.get(name, version)  # the model may not be loaded; it is loaded when a request needs it
        services.require_ready()
        return ModelReady(name=name, ready=True)

    async def get_statistics(name: str, version: str | None) -> dict[str, Any]:
        model = await services.get_model(name, version)
        services.classifier.metrics.fold()
        return {"model_stats": [render_statistics(model)]}

    async def get_configuration(name: str, version: str | None) -> dict[str, Any]:
        return render_configuration(await services.get_model(name, version), services.settings.request_images)

    add_route("", get_metadata, ModelMetadata, "Inputs and outputs of a model")
    add_route(
        "/config", get_configuration, dict[str, Any], "Configuration of a model, as Triton's clients read it"
    )
    add_route("/ready", check_ready, ModelReady, "Readiness of a model")
    add_route("/stats", get_statistics, dict[str, Any], "Statistics of a model since it was loaded")


def render_metadata(model: LiveModel, versions: list[str]) -> ModelMetadata:
    """Return the metadata with one input and one output.

    Clients send every input that the metadata names, and many clients refuse more than one. The others are in
    `alternatives`.
    """
    *others, default_input = [
        TensorMetadata(name=one.name, datatype=DATATYPES[one.dtype], shape=[-1, *one.shape])
        for one in model.tensors
    ]
    encoded = TensorMetadata(
        name=ModelInputs(model.tensors).encoded_name, datatype=ENCODED_DATATYPE, shape=[-1]
    )
    first, *further = [
        TensorMetadata(name=name, datatype=FLOAT_DATATYPE, shape=[-1, kind.width])
        for name, kind in list_outputs(model).items()
    ]
    return ModelMetadata(
        name=model.name,
        versions=versions,
        platform=_PLATFORM,
        inputs=[default_input],
        outputs=[first],
        alternatives=Alternatives(inputs=[*others, encoded], outputs=further),
    )


def render_configuration(model: LiveModel, max_batch_size: int) -> dict[str, Any]:
    """Return the configuration in Triton's form.

    Clients read the largest batch from it, and the sizes and layout of one image.
    """
    default_input, name = model.tensors[-1], model.contract.probabilities_name
    layout = "FORMAT_NHWC" if default_input.shape[-1] == _CHANNELS else "FORMAT_NCHW"
    data_type = f"TYPE_{DATATYPES[default_input.dtype]}"
    return {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": max_batch_size,
        "input": [
            {
                "name": default_input.name,
                "data_type": data_type,
                "format": layout,
                "dims": list(default_input.shape),
            }
        ],
        "output": [
            {"name": name, "data_type": f"TYPE_{FLOAT_DATATYPE}", "dims": [list_outputs(model)[name].width]}
        ],
    }


_CHANNELS: Final = 3


def render_statistics(model: LiveModel) -> dict[str, Any]:
    """Return the statistics in Triton's form.

    `success` and `fail` count requests, the other entries count images. The numbers are those of the worker
    that answers, since it loaded the model.
    """
    statistics = model.statistics
    calls = sum(call.count for call in statistics.model_calls.values())
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round((time.time() - time.monotonic() + statistics.last_answer_at) * 1000)
        if statistics.last_answer_at
        else 0,
        "inference_count": round(statistics.inference.count),
        "execution_count": round(calls),
        "inference_stats": {
            "success": _render_sum(statistics.succeeded_requests),
            "fail": _render_sum(statistics.failed_requests),
            "queue": _render_sum(statistics.queue),
            "compute_input": _render_sum(statistics.decode),
            "compute_infer": _render_sum(statistics.inference),
            "compute_output": _render_sum(DurationSum()),
            "cache_hit": _render_sum(DurationSum()),
            "cache_miss": _render_sum(DurationSum()),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _render_sum(DurationSum()),
                "compute_infer": _render_sum(call),
                "compute_output": _render_sum(DurationSum()),
            }
            for size, call in sorted(statistics.model_calls.items())
        ],
    }


def _render_sum(total: DurationSum) -> dict[str, int]:
    return {"count": round(total.count), "ns": round(total.seconds * 1e9)}
