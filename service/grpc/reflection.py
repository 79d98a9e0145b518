"""Server reflection (grpc.reflection.v1alpha): tools such as grpcurl read the protocol from the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from fovea.service.errors import BadRequest
from fovea.service.grpc.calls import Call, Method, parse_small_message

_MAX_QUESTIONS: Final = 1000
"""Maximum number of questions of one call."""


class ReflectionMethods:
    """The method of `grpc.reflection.v1alpha.ServerReflection`."""

    def __init__(self, names: Sequence[str]) -> None:
        """Describe the services with these names."""
        self._servicer = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])

    def list_methods(self) -> dict[str, Method]:
        """Return the methods by path. They are open, like the OpenAPI document."""
        return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": Method(self._answer_questions, None)}

    async def _answer_questions(self, call: Call) -> bytes:
        async for answer in self._servicer.ServerReflectionInfo(_read_questions(call), call.context):
            await call.context.write(answer.SerializeToString())
        return b""


async def _read_questions(call: Call) -> AsyncIterator[Any]:
    """Yield the questions of a call. Raises `RequestError`."""
    for _ in range(_MAX_QUESTIONS):
        async with call.hold_slot():
            message = await call.context.read()
        if message is grpc.aio.EOF:
            return
        yield parse_small_message(message, reflection_pb2.ServerReflectionRequest)
    raise BadRequest(f"the call has more than {_MAX_QUESTIONS} questions; start another call")
