"""Channels to a service with gRPC, and its stub."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import grpc

from tests.servers import Server
from tests.service.grpc.generate import generate_modules


def grpc_address(server: Server) -> str:
    """Return the address of a server's gRPC port."""
    found = re.search(r"gRPC on port (\d+)", server.greeting)
    assert found, server.greeting
    return f"127.0.0.1:{found[1]}"


@contextmanager
def open_channel(server: Server, **options: int) -> Iterator[grpc.Channel]:
    """Open a channel to a server. Options are those of gRPC, with underscores for their dots."""
    pairs = [("grpc." + name, value) for name, value in options.items()]
    with grpc.insecure_channel(grpc_address(server), pairs) as channel:
        yield channel


def create_stub(channel: grpc.Channel) -> Any:
    """Return the stub of the inference service that grpcio-tools generates from our file."""
    return _generate_stub().GRPCInferenceServiceStub(channel)


@cache
def _generate_stub() -> Any:
    folder = Path(mkdtemp(prefix="fovea-stub-"))
    generate_modules(folder, f"--grpc_python_out={folder}")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("inference_pb2_grpc")
    finally:
        sys.path.remove(str(folder))


def read_error(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return the status, the message and the trailing metadata of an error."""
    return error.code(), error.details(), dict(error.trailing_metadata())
