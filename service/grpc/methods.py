"""The methods of the inference service. Their answers are those over HTTP (`service.api.oip`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fovea.service import __version__
from fovea.service.access.caller import Scope
from fovea.service.access.caller_limits import CallerReservation
from fovea.service.api.adapter import InferenceRequest
from fovea.service.api.bodies import RawBody
from fovea.service.api.endpoint import Endpoint
from fovea.service.api.oip import routes as oip
from fovea.service.api.oip.repository import RepositoryManager
from fovea.service.api.services import ModelAddress, Services
from fovea.service.errors import BadRequest, MethodNotAllowed, ModelNotFound, Unavailable
from fovea.service.grpc import inference_pb2 as pb
from fovea.service.grpc.calls import PROTOCOL, Call, Method
from fovea.service.grpc.infer import GrpcInferAdapter
from fovea.service.grpc.infer_message import split_message
from fovea.service.serving.admission import hold_body

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

INFER_PATH: Final = f"/{SERVICE_NAME}/ModelInfer"
"""Path of the only method whose messages have images."""

_EXTENSIONS: Final = [one for one in oip.EXTENSIONS if one != "binary_tensor_data"]
"""Extensions of the protocol; raw contents are part of gRPC itself."""


class InferenceMethods:
    """The methods of `inference.GRPCInferenceService`."""

    def __init__(self, services: Services, repository: RepositoryManager) -> None:
        self._services = services
        self._repository = repository
        self._endpoint = Endpoint(services, GrpcInferAdapter(), PROTOCOL)

    def list_methods(self) -> dict[str, Method]:
        """Return the methods by path."""
        open_methods = {
            "ServerLive": self._check_live,
            "ServerReady": self._check_ready,
            "ServerMetadata": self._describe_server,
        }
        classify_methods = {
            "ModelReady": self._check_model,
            "ModelMetadata": self._describe_model,
            "ModelConfig": self._configure_model,
            "ModelStatistics": self._count_model,
            "ModelInfer": self._infer,
            "ModelStreamInfer": self._refuse_stream,
            "RepositoryIndex": self._list_models,
        }
        manage_methods = {
            "RepositoryModelLoad": self._load_model,
            "RepositoryModelUnload": self._unload_model,
        }
        return {
            f"/{SERVICE_NAME}/{name}": Method(handle, scope)
            for handlers, scope in (
                (open_methods, None),
                (classify_methods, Scope.CLASSIFY),
                (manage_methods, Scope.MANAGE),
            )
            for name, handle in handlers.items()
        }

    # --- the server ---

    async def _check_live(self, call: Call) -> bytes:
        await call.parse_message(pb.ServerLiveRequest)
        return _encode(pb.ServerLiveResponse(live=_succeeds(self._services.classifier.require_alive)))

    async def _check_ready(self, call: Call) -> bytes:
        await call.parse_message(pb.ServerReadyRequest)
        return _encode(pb.ServerReadyResponse(ready=_succeeds(self._services.require_ready)))

    async def _describe_server(self, call: Call) -> bytes:
        await call.parse_message(pb.ServerMetadataRequest)
        return _encode(pb.ServerMetadataResponse(name="fovea", version=__version__, extensions=_EXTENSIONS))

    # --- a model ---

    async def _check_model(self, call: Call) -> bytes:
        """Answer false for a model that does not exist, as Triton does."""
        request = await call.parse_message(pb.ModelReadyRequest)

        def require_model() -> None:
            self._services.classifier.catalog.get(request.name, request.version or None)
            self._services.require_ready()

        return _encode(pb.ModelReadyResponse(ready=_succeeds(require_model)))

    async def _describe_model(self, call: Call) -> bytes:
        request = await call.parse_message(pb.ModelMetadataRequest)
        model = await self._services.get_model(request.name, request.version or None)
        versions = self._services.classifier.catalog.list_versions(request.name)
        metadata = oip.render_metadata(model, [one.version or "" for one in versions])
        return _encode(pb.ModelMetadataResponse(**metadata.model_dump(exclude={"alternatives"})))

    async def _configure_model(self, call: Call) -> bytes:
        request = await call.parse_message(pb.ModelConfigRequest)
        model = await self._services.get_model(request.name, request.version or None)
        configuration = oip.render_configuration(model, self._services.settings.request_images)
        return _encode(pb.ModelConfigResponse(config=pb.ModelConfig(**configuration)))

    async def _count_model(self, call: Call) -> bytes:
        """Return the statistics of a model, or of all loaded models without a name."""
        request = await call.parse_message(pb.ModelStatisticsRequest)
        if request.name:
            models = [await self._services.get_model(request.name, request.version or None)]
        else:
            models = list(self._services.classifier.catalog.models)
        self._services.classifier.metrics.fold()
        return _encode(
            pb.ModelStatisticsResponse(
                model_stats=[pb.ModelStatistics(**oip.render_statistics(model)) for model in models]
            )
        )

    async def _infer(self, call: Call) -> bytes:
        services = self._services
        services.lifecycle.require_accepting()
        caller = services.reserve_caller(call.record)  # before the message is received
        try:
            async with call.limit_time():
                return await self._answer_images(call, caller)
        finally:
            if caller:
                caller.release()

    async def _answer_images(self, call: Call, caller: CallerReservation | None) -> bytes:
        services, record = self._services, call.record
        content = await call.read_message()
        with hold_body(services.classifier, len(content)):  # the model may have to be loaded first
            message = split_message(content, services.settings.json_bytes)
            address = ModelAddress(message.head.model_name, message.head.model_version or None)
            model = services.admit(*address, record)
            admission = await services.create_admission(address, model, record, caller)
        with admission:
            admission.reserve_bytes(len(content))
            services.end_stage("read", record.started_at, record)
            request = InferenceRequest(
                RawBody(b"", 0), call.headers, message, admission.model, services.settings, record
            )
            return (await self._endpoint.handle_request(request, admission, call.deadline)).content

    async def _refuse_stream(self, call: Call) -> bytes:
        """Refuse streams: each would hold the memory for a whole message as long as it is open."""
        raise MethodNotAllowed("ModelStreamInfer is not supported; call ModelInfer for each request")

    # --- the repository ---

    async def _list_models(self, call: Call) -> bytes:
        self._repository.require_index_allowed()
        request = await call.parse_message(pb.RepositoryIndexRequest)
        _check_repository(request)
        models = await self._repository.list_models(only_ready=request.ready)
        return _encode(
            pb.RepositoryIndexResponse(
                models=[pb.RepositoryIndexResponse.ModelIndex(**one) for one in models]
            )
        )

    async def _load_model(self, call: Call) -> bytes:
        self._repository.require_allowed()
        request = await call.parse_message(pb.RepositoryModelLoadRequest)
        _check_repository(request)
        for name in request.parameters:
            if name != "version":
                raise BadRequest(f"the parameter {name!r} is not supported; the only parameter is 'version'")
        version = request.parameters["version"].string_param if request.parameters else None
        await self._repository.load(request.model_name, version)
        return _encode(pb.RepositoryModelLoadResponse())

    async def _unload_model(self, call: Call) -> bytes:
        self._repository.require_allowed()
        request = await call.parse_message(pb.RepositoryModelUnloadRequest)
        _check_repository(request)
        await self._repository.unload(request.model_name)
        return _encode(pb.RepositoryModelUnloadResponse())


def _check_repository(request: Any) -> None:
    """Raise `BadRequest` if a request names a repository, because a service has one."""
    if request.repository_name:
        raise BadRequest("repository_name is not supported; leave it empty")


def _succeeds(check: Callable[[], None]) -> bool:
    """Return whether a check passes, for questions whose answer is true or false."""
    try:
        check()
    except (Unavailable, ModelNotFound):
        return False
    return True


def _encode(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content
