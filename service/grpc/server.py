"""The gRPC server of one process, beside its HTTP server and on the same event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import grpc

from fovea.service.api.oip.repository import RepositoryManager
from fovea.service.api.services import Services
from fovea.service.errors import MethodNotAllowed, StartError
from fovea.service.grpc import health, methods
from fovea.service.grpc.calls import Call, Method, SharedLimits, answer_call
from fovea.service.grpc.credentials import create_credentials
from fovea.service.grpc.delayed_refusals import DelayedRefusals
from fovea.service.grpc.health import HealthMethods
from fovea.service.grpc.message_slots import MessageSlots
from fovea.service.grpc.methods import InferenceMethods
from fovea.service.grpc.port import format_address
from fovea.service.grpc.reflection import ReflectionMethods
from fovea.service.grpc.unread_replies import UnreadReplies
from fovea.service.http.certificates import CertificateFiles
from fovea.service.settings import Settings

_MAX_STREAMS: Final = 128
"""Maximum number of calls at the same time on one connection. The client keeps further calls waiting."""

_METADATA_BYTES: Final = 16 << 10
"""Maximum size of the metadata of a call, in bytes."""

_KEEPALIVE_SECONDS: Final = 60
"""Time in seconds without data after which a client must answer a ping."""

_KEEPALIVE_TIMEOUT: Final = 20
"""Time in seconds for this answer, after which the connection is closed and its calls are cancelled."""

_MIN_PING_SECONDS: Final = 10
"""Time in seconds between two pings of a client that has nothing else to send. More pings end the
connection."""

_MAX_PING_STRIKES: Final = 2

_SMALL_MESSAGE_PATIENCE: Final = 0.1
"""Time in seconds for a message without images while other calls wait. Such a message usually arrives with
its call, and probes have a time limit of a second."""

_IDENTITY_ONLY: Final = 1
"""Bit set of the accepted compressions. gRPC unpacks a compressed message completely before it compares the
size with the limit, so that 64 KB could become 64 MB many times over."""


class GrpcServer:
    """A server for gRPC that shares everything but the port with the HTTP server."""

    def __init__(self, services: Services, repository: RepositoryManager) -> None:
        self._services = services
        settings = services.settings
        names = (methods.SERVICE_NAME, health.SERVICE_NAME)
        message_count = max(1, settings.bodies_bytes // settings.body_bytes)
        limits = settings.queue_images, settings.body_timeout
        self._image_slots = MessageSlots(message_count, *limits)
        # Probes must not wait for the images of slow clients, nor images for calls that need no key.
        self._small_slots = MessageSlots(1, *limits, patience=_SMALL_MESSAGE_PATIENCE)
        # A client may leave a stream of questions open. It must not keep other calls waiting meanwhile.
        self._reflection_slots = MessageSlots(1, *limits)
        reflection_methods = ReflectionMethods(names).list_methods()
        self._methods: dict[str, Method] = {
            **InferenceMethods(services, repository).list_methods(),
            **HealthMethods(services, set(names)).list_methods(),
            **reflection_methods,
        }
        self._reflection_paths = set(reflection_methods)
        self._streaming_paths = {f"/{health.SERVICE_NAME}/Watch", *reflection_methods}
        self._limits = SharedLimits(DelayedRefusals(), UnreadReplies(settings.bodies_bytes))
        self._open_streams: set[asyncio.Task[Any]] = set()
        self._is_stopping = False

    async def start(self) -> None:
        """Listen on FOVEA_GRPC_PORT. Raises `StartError`."""
        settings = self._services.settings
        logging.getLogger("grpc").setLevel(logging.WARNING)  # it has a line for each call on level debug
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_decoding_error)
        self._server = grpc.aio.server(options=_list_options(settings))
        self._server.add_generic_rpc_handlers((_GenericHandler(self._create_handler),))
        address = format_address(settings.host, settings.grpc_port or 0)
        try:
            self._add_port(address)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {address} (FOVEA_GRPC_PORT): {error}") from None
        await self._server.start()

    def _add_port(self, address: str) -> None:
        """Bind the port, with TLS if the HTTP server has TLS. Raises `RuntimeError`, or `StartError`."""
        if files := CertificateFiles.from_settings(self._services.settings):
            self._server.add_secure_port(address, create_credentials(files))
        else:
            self._server.add_insecure_port(address)

    async def stop(self, seconds: float | None) -> None:
        """Refuse new calls, finish the accepted calls within `seconds`, then cancel the rest.

        None cancels at once, also while an earlier call of this method waits.
        """
        self._is_stopping = True
        for task in list(self._open_streams):  # they would last until their clients leave
            task.cancel()
        await self._server.stop(seconds)

    def _create_handler(self, path: str) -> grpc.RpcMethodHandler:
        """Return gRPC's handler of a method.

        Every handler reads its messages by itself, so that a call is admitted before its message is received.
        On the wire this is no difference.
        """
        slots = self._find_slots(path)
        method = self._methods.get(path)

        async def answer(_messages: Any, context: Any) -> bytes:
            call = Call(self._services, slots, self._limits, context, path if method else "unmatched")
            return await answer_call(call, method or _UNKNOWN_METHOD)

        async def answer_stream(_messages: Any, context: Any) -> None:
            task = asyncio.current_task()
            assert task, "gRPC runs each handler in a task"  # noqa: S101
            self._open_streams.add(task)
            try:
                await answer(_messages, context)
            except asyncio.CancelledError:
                if not self._is_stopping or context.cancelled():
                    raise
                # Cancelled by `stop`. gRPC itself would leave the stream open.
                task.uncancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the service is stopping")
            finally:
                self._open_streams.discard(task)

        if path in self._streaming_paths:
            return grpc.stream_stream_rpc_method_handler(answer_stream, None, None)
        return grpc.stream_unary_rpc_method_handler(answer, None, None)

    def _find_slots(self, path: str) -> MessageSlots:
        if path == methods.INFER_PATH:
            return self._image_slots
        return self._reflection_slots if path in self._reflection_paths else self._small_slots


def _is_no_decoding_error(record: logging.LogRecord) -> bool:
    """Return False for a line of gRPC about bytes of a client that are not UTF-8.

    Such lines have a traceback and the bytes, among them the value of `authorization`. Any client could fill
    the log with them.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))


async def _refuse_unknown(_call: Call) -> bytes:
    raise MethodNotAllowed("there is no such method")


_UNKNOWN_METHOD: Final = Method(_refuse_unknown, None)


class _GenericHandler(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC has no types
    """The way from the path of a method to its handler. A path without a method has a handler as well."""

    def __init__(self, create_handler: Callable[[str], grpc.RpcMethodHandler]) -> None:
        self._create_handler = create_handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return the handler of a call."""
        return self._create_handler(handler_call_details.method)


def _list_options(settings: Settings) -> list[tuple[str, int]]:
    """Return the options of the server: every limit that the HTTP server has, as far as gRPC has it."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.max_allowed_incoming_connections", settings.grpc_connections),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.max_connection_idle_ms", round(1000 * settings.keep_alive)),
        ("grpc.server_handshake_timeout_ms", round(1000 * settings.header_timeout)),
        ("grpc.keepalive_time_ms", 1000 * _KEEPALIVE_SECONDS),
        ("grpc.keepalive_timeout_ms", 1000 * _KEEPALIVE_TIMEOUT),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000 * _MIN_PING_SECONDS),
        ("grpc.http2.max_ping_strikes", _MAX_PING_STRIKES),
        ("grpc.http2.bdp_probe", 0),  # otherwise calls that nobody reads get windows of megabytes
    ]
