"""The health service of gRPC (grpc.health.v1), as Kubernetes and load balancers ask for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final

from grpc_health.v1 import health_pb2

from fovea.service.access.caller import exceeds_share, name_caller
from fovea.service.api.services import Services
from fovea.service.errors import NotFound, Overloaded, Unavailable
from fovea.service.grpc.calls import Call, Method

SERVICE_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_POLL_INTERVAL: Final = 0.5
"""Time in seconds between two looks at the service for a client that watches it."""

_MAX_WATCHERS: Final = 64
"""Maximum number of clients that watch at the same time."""

_Status: Final = health_pb2.HealthCheckResponse


class HealthMethods:
    """The methods of `grpc.health.v1.Health`. A service is healthy if its models are ready."""

    def __init__(self, services: Services, names: set[str]) -> None:
        """Set the names that clients may ask about; the empty name is the whole server."""
        self._services = services
        self._names = {"", *names}
        self._watchers: Counter[str] = Counter()
        """Number of clients that watch, by caller."""

    def list_methods(self) -> dict[str, Method]:
        """Return the methods by path. They are open, like the probes over HTTP."""
        return {
            f"/{SERVICE_NAME}/Check": Method(self._check, None),
            f"/{SERVICE_NAME}/Watch": Method(self._watch, None),
        }

    async def _check(self, call: Call) -> bytes:
        request = await call.parse_message(health_pb2.HealthCheckRequest)
        if request.service not in self._names:
            raise NotFound(f"there is no service {request.service[:80]!r}")
        return self._render_status(request)

    async def _watch(self, call: Call) -> bytes:
        """Send the status now and whenever it changes, until the client leaves or the server stops."""
        watchers, caller = self._watchers, name_caller(call.record.caller)
        total = watchers.total() + 1
        if total > _MAX_WATCHERS or exceeds_share(
            own=watchers[caller] + 1,
            total=total,
            callers=len(watchers) + (caller not in watchers),
            limit=_MAX_WATCHERS,
        ):
            raise Overloaded("too many clients watch", retry_after=_POLL_INTERVAL)
        watchers[caller] += 1
        try:
            request = await call.parse_message(health_pb2.HealthCheckRequest)
            sent = b""
            while True:
                status = self._render_status(request)
                if status != sent:
                    await call.context.write(status)
                    sent = status
                await asyncio.sleep(_POLL_INTERVAL)
        finally:
            watchers[caller] -= 1
            if not watchers[caller]:
                del watchers[caller]

    def _render_status(self, request: Any) -> bytes:
        status = _Status.SERVING
        if request.service not in self._names:
            status = _Status.SERVICE_UNKNOWN
        else:
            try:
                self._services.require_ready()
            except Unavailable:
                status = _Status.NOT_SERVING
        content: bytes = _Status(status=status).SerializeToString()
        return content
