"""The port of gRPC: reserved at the start, and shared by all workers."""

from __future__ import annotations

import importlib.util
import socket
from typing import Final

from fovea.service.errors import StartError
from fovea.service.settings import Settings

_MODULES: Final = ("grpc", "grpc_health", "grpc_reflection", "google.protobuf")
"""Modules of the extra `grpc`."""


def reserve_port(settings: Settings) -> socket.socket:
    """Reserve `FOVEA_GRPC_PORT`, and return the socket that holds it.

    gRPC listens on a port by itself, in each worker, and so that other sockets can share the port. The bound
    socket makes this safe: no other service can have the port, and the port is known before the models are
    loaded. It never listens, so it gets no connection. Raises `StartError`.
    """
    require_modules()
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.grpc_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        reserved = socket.socket(family, kind, protocol)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)  # alone: the next line must not come before this one
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartError(
            f"cannot listen on {settings.host}:{settings.grpc_port} (FOVEA_GRPC_PORT): {reason}"
        ) from None
    return reserved


def require_modules() -> None:
    """Raise `StartError` if a module of the extra `grpc` is missing."""
    for name in _MODULES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the parent of a dotted name is missing
            found = None
        if found is None:
            raise StartError(
                f"FOVEA_GRPC_PORT needs the extra `grpc`: the module {name} is not installed; run "
                "pip install 'fovea-serve[grpc]'"
            )


def format_address(host: str, port: int) -> str:
    """Return an address as gRPC reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
