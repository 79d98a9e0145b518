"""Model management: the index of the repository, and loading and unloading on request.

It is Open Inference Protocol's model repository extension, as implemented by Triton. Changes are off unless
FOVEA_MANAGEMENT is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError

from fovea.service.api.cross_site import require_same_site
from fovea.service.api.json_bodies import to_bad_request, to_utf8
from fovea.service.api.oip import routes as oip
from fovea.service.api.reply_schemas import FlatError, build_error_responses
from fovea.service.api.request_schemas import INDEX_BODY, LOAD_BODY, IndexRequest, LoadRequest
from fovea.service.artifact.repository import find_versions
from fovea.service.artifact.repository import list_model_names as names_in
from fovea.service.errors import BodyTooLarge, Forbidden, ModelError
from fovea.service.serving.catalog import VersionState, VersionStatus
from fovea.service.serving.classifier import Classifier

_STATES: Final = {
    VersionState.LOADING: "LOADING",
    VersionState.READY: "READY",
    VersionState.DRAINING: "UNLOADING",
}
"""Triton's names of the states of a version. A version in any other state is `UNAVAILABLE`."""

_MAX_BODY_BYTES: Final = 4096
"""Maximum size of a request body in bytes."""

_ERROR_RESPONSES: Final = build_error_responses(FlatError)

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    **{status: _ERROR_RESPONSES[status] for status in (400, 404, 413)},
    403: {
        "description": "Management is switched off, or the request comes from a page of another site.",
        "model": FlatError,
    },
    409: {
        "description": "The version did not pass its checks; the version that was served is still served.",
        "model": FlatError,
    },
}


class ModelLoader(Protocol):
    """An object that can change the served models."""

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Serve this version of a model from now on.

        Without a version the repository selects one. `name` is None for a single model file.

        Raises `SwapRefused`, or `ModelNotFound` if there is no such model.
        """

    async def unload(self, name: str | None) -> None:
        """Stop serving a model until it is loaded again.

        Raises `ModelNotFound` if the model is not served.
        """


class RepositoryManager:
    """The operations of the model repository extension, for HTTP and gRPC."""

    def __init__(self, classifier: Classifier, loader: ModelLoader) -> None:
        self._classifier = classifier
        self._catalog = classifier.catalog
        self._loader = loader

    def require_allowed(self) -> None:
        """Raise `Forbidden` unless management is switched on."""
        if not self._classifier.settings.management:
            raise Forbidden("management is switched off (FOVEA_MANAGEMENT)")

    def require_index_allowed(self) -> None:
        """Raise `Forbidden` unless the index may be read: the protocol or management is switched on."""
        if oip.PROTOCOL.name not in self._classifier.settings.protocols:
            self.require_allowed()

    async def list_models(self, *, only_ready: bool) -> list[dict[str, str]]:
        """Return the models of the repository and their states; with `only_ready`, those that are loaded."""
        statuses = self._catalog.list_statuses()
        if only_ready:
            return [_render_status(one) for one in statuses if one.state is VersionState.READY]
        unserved = await asyncio.to_thread(self._list_unserved, statuses)
        return [_render_status(one) for one in statuses] + unserved

    async def load(self, name: str, version: str | None) -> list[dict[str, str]]:
        """Serve the version that the repository selects now, or the given one, and return what is served.

        Call `require_allowed` first. Raises `SwapRefused` or `ModelNotFound`.
        """
        await self._loader.load(self._find_folder(name), version)
        return self._list_served(name)

    async def unload(self, name: str) -> list[dict[str, str]]:
        """Stop serving a model until it is loaded again, and return what is still served.

        Call `require_allowed` first. Raises `ModelNotFound`.
        """
        await self._loader.unload(self._find_folder(name))
        return self._list_served(name)

    def _find_folder(self, name: str) -> str | None:
        """Return the folder of a model, or None for a single model file.

        A single file is not in a folder; its name comes from its contract. A worker that started after the
        file was unloaded does not know this name.
        """
        is_single = self._classifier.settings.models.is_file() and self._catalog.single_model_name in (
            name,
            None,
        )
        return None if is_single else name

    def _list_served(self, name: str) -> list[dict[str, str]]:
        """Return the versions of a model that answer, or that the next request loads."""
        catalog = self._catalog
        served_versions = {(one.name, one.version) for one in catalog.models}
        served_versions |= {(one.name or "", one.version or "") for one in catalog.on_demand_versions}
        return [
            _render_status(one)
            for one in catalog.list_statuses()
            if one.name == name
            and one[:2] in served_versions
            and one.state in (VersionState.READY, VersionState.LOADING, VersionState.FOUND)
        ]

    def _list_unserved(self, statuses: Sequence[VersionStatus]) -> list[dict[str, str]]:
        """Return the versions in the repository that are not in the catalog: unloaded or new.

        Runs in a thread, because it reads folders.
        """
        settings = self._classifier.settings
        root = settings.models
        known_names = {one.name for one in statuses if one.state is not VersionState.REFUSED}
        refused = {(one.name, one.version) for one in statuses if one.state is VersionState.REFUSED}
        versions: list[tuple[str, str]] = []
        with suppress(ModelError):  # the repository cannot be read, which is logged elsewhere
            for name in set() if root.is_file() else set(names_in(root, settings.model_name)) - known_names:
                with suppress(ModelError, OSError):
                    versions += [(name, one.version or "") for one in find_versions(root, name)]
        single_name = self._catalog.single_model_name
        if root.is_file() and single_name and single_name not in known_names:
            versions.append((single_name, ""))
        unserved = sorted(set(versions) - refused)
        return [_render_entry(name, version, "UNAVAILABLE", "not served") for name, version in unserved]


def add_routes(app: FastAPI, classifier: Classifier, repository: RepositoryManager) -> None:
    """Add the management routes."""

    def require_change_allowed(request: Request) -> None:
        repository.require_allowed()
        require_same_site(request, classifier.settings.management_hosts)

    route_options: dict[str, Any] = {
        "tags": ["management"],
        "responses": _RESPONSES,
    }

    @app.post("/v2/repository/index", openapi_extra={"requestBody": INDEX_BODY}, **route_options)
    async def index(request: Request) -> list[dict[str, str]]:
        """List the models of the repository and their states; with `ready`, only those that are loaded."""
        repository.require_index_allowed()
        index_request = await _read_body(request, IndexRequest)
        return await repository.list_models(only_ready=index_request.ready)

    @app.post("/v2/repository/models/{name}/load", openapi_extra={"requestBody": LOAD_BODY}, **route_options)
    async def load(name: str, request: Request) -> list[dict[str, str]]:
        """Serve the version of a model that the repository selects now, or a given version.

        The version must pass its checks first. A version that fails them changes nothing.
        """
        require_change_allowed(request)
        load_request = await _read_body(request, LoadRequest)
        return await repository.load(name, load_request.parameters.version)

    @app.post("/v2/repository/models/{name}/unload", **route_options)
    async def unload(name: str, request: Request) -> list[dict[str, str]]:
        """Stop serving a model until it is loaded again."""
        require_change_allowed(request)
        return await repository.unload(name)


def _render_status(status: VersionStatus) -> dict[str, str]:
    prefix = {VersionState.FOUND: "resting", VersionState.REFUSED: "refused"}.get(status.state, "")
    reason = "" if status.state is VersionState.READY else ": ".join(filter(None, (prefix, status.reason)))
    return _render_entry(status.name, status.version, _STATES.get(status.state, "UNAVAILABLE"), reason)


def _render_entry(name: str, version: str, state: str, reason: str) -> dict[str, str]:
    return {"name": name, "version": version, "state": state, "reason": reason}


_T = TypeVar("_T", bound=BaseModel)


async def _read_body(request: Request, schema: type[_T]) -> _T:
    """Read the body.

    FastAPI would read a body of any size, and before the request is authorised. Raises `BodyTooLarge`, or
    `BadRequest`.
    """
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > _MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has more than {_MAX_BODY_BYTES} bytes")
    try:
        return schema.model_validate_json(to_utf8(content) or b"{}")
    except ValidationError as error:
        raise to_bad_request(error) from None
