"""Model management: the index of the repository, and loading and unloading on request.

It is Open Inference Protocol's model repository extension, as implemented by Triton. Changes are off unless
FOVEA_MANAGEMENT is set.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError

from fovea.service.api.bodies import in_utf8, malformed
from fovea.service.api.cross_site import require_own
from fovea.service.api.oip import routes as oip
from fovea.service.api.schemas import INDEX_BODY, LOAD_BODY, FlatError, IndexRequest, LoadRequest, failures
from fovea.service.artifact.repository import ModelVersion, RefusedVersion, find_versions
from fovea.service.artifact.repository import list_model_names as names_in
from fovea.service.errors import BodyTooLarge, Forbidden, ModelError
from fovea.service.serving.classifier import Classifier

_BODY: Final = 4096
"""Maximum size of a request body in bytes."""

_SAID: Final = failures(FlatError)

_REPLIES: Final[dict[int | str, dict[str, Any]]] = {
    **{status: _SAID[status] for status in (400, 404, 413)},
    403: {"description": "Management is switched off, or a page of another site asks.", "model": FlatError},
    409: {"description": "It did not pass its checks; what was served still is.", "model": FlatError},
}


class Manager(Protocol):
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


def add_routes(app: FastAPI, classifier: Classifier, manager: Manager) -> None:
    """Add the management routes."""
    repository = classifier.registry

    def require_allowed() -> None:
        if not classifier.settings.management:
            raise Forbidden("management is switched off (FOVEA_MANAGEMENT)")

    def require_change_allowed(request: Request) -> None:
        require_allowed()
        require_own(request, classifier.settings.management_hosts)

    def folder(name: str) -> str | None:
        """Return the folder of a model, or None for a single model file.

        A single file is not in a folder; its name comes from its contract. A worker that started after the
        file was unloaded does not know this name.
        """
        is_single = classifier.settings.models.is_file() and repository.single_model_name in (name, None)
        return None if is_single else name

    def state(name: str) -> list[dict[str, str]]:
        live = [
            {"name": one.name, "version": one.version, "state": "READY", "reason": ""}
            for one in repository.models
        ]
        resting = [_unavailable(one, "resting") for one in repository.on_demand_versions]
        return [one for one in live + resting if name in ("", one["name"])]

    def unserved() -> list[dict[str, str]]:
        """Return the models in the repository that are not served: unloaded, refused, or new."""
        root, known = classifier.settings.models, {one.name for one in repository.models}
        found: list[ModelVersion] = []
        with suppress(ModelError):  # the repository cannot be read, which is logged elsewhere
            names = [] if root.is_file() else names_in(root)
            for name in set(names) - set(repository.versions_by_model) - known:
                with suppress(ModelError, OSError):
                    found += find_versions(root, name)
        refused = {(one.name, one.version): one.reason for one in repository.refused_versions}
        others = [(one, "not served") for one in found if (one.name, one.version) not in refused]
        every = [_unavailable(one, reason) for one, reason in others]
        every += [_unavailable(one, f"refused: {one.reason}") for one in repository.refused_versions]
        if root.is_file() and not repository.versions_by_model and repository.single_model_name:
            every.append(_unavailable(RefusedVersion(repository.single_model_name, "", ""), "not served"))
        return sorted(every, key=lambda one: (one["name"], one["version"]))

    documented: dict[str, Any] = {
        "tags": ["management"],
        "responses": _REPLIES,
    }

    @app.post("/v2/repository/index", openapi_extra={"requestBody": INDEX_BODY}, **documented)
    async def index(request: Request) -> list[dict[str, str]]:
        """The repository's models, and whether they are loaded: `ready` leaves out those that are not."""
        if oip.DIALECT.name not in classifier.settings.dialects:
            require_allowed()
        wanted = await _read(request, IndexRequest)
        every = state("") if wanted.ready else state("") + await asyncio.to_thread(unserved)
        return [one for one in every if one["state"] == "READY" or not wanted.ready]

    @app.post("/v2/repository/models/{name}/load", openapi_extra={"requestBody": LOAD_BODY}, **documented)
    async def load(name: str, request: Request) -> list[dict[str, str]]:
        """Serve what the repository has of a model now, or one version of it. It is tried first."""
        require_change_allowed(request)
        wanted = await _read(request, LoadRequest)
        await manager.load(folder(name), wanted.parameters.version)
        return state(name)

    @app.post("/v2/repository/models/{name}/unload", **documented)
    async def unload(name: str, request: Request) -> list[dict[str, str]]:
        """Serve a model no more, until it is loaded again."""
        require_change_allowed(request)
        await manager.unload(folder(name))
        return state(name)


def _unavailable(found: ModelVersion | RefusedVersion, reason: str) -> dict[str, str]:
    name, version = found.name or "", found.version or ""
    return {"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason}


_T = TypeVar("_T", bound=BaseModel)


async def _read(request: Request, kind: type[_T]) -> _T:
    """Read the body.

    FastAPI would read a body of any size, and before the request is authorised. Raises `BodyTooLarge`, or
    `BadRequest`.
    """
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > _BODY:
            raise BodyTooLarge(f"the body has more than {_BODY} bytes")
    try:
        return kind.model_validate_json(in_utf8(content) or b"{}")
    except ValidationError as error:
        raise malformed(error) from None
