"""The composition root: the one place that touches the process (environment, signals, sockets, logs)."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics

from service import __version__
from service.app import create_app
from service.errors import StartError, one_line
from service.images import settle_pillow
from service.repository import Repository
from service.settings import Settings, load_settings


def main(**overrides: Any) -> int:
    """Serve until a signal ends it; return the exit code. `overrides` are settings by name."""
    try:
        settings = load_settings(**overrides)
        _set_up_process(settings)
        listener = _bind(settings)
        app = create_app(settings, registry=_registry())
        greeting = _greeting(_url(settings, listener), app.state.classifier.repository)
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
        _Server(config, greeting).run(sockets=[listener])
    except StartError as error:
        print(f"fovea: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


class _Server(uvicorn.Server):
    """uvicorn's server, which says where it is once it listens, and exits 0 after a signal."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process began to listen after both had bound
            await self.lifespan.shutdown()
            raise StartError(f"cannot listen: {error.strerror}") from None
        print(self._greeting, flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Shut down on SIGINT and SIGTERM. uvicorn's own would raise the signal again afterwards."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _set_up_process(settings: Settings) -> None:
    settle_pillow()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its own account of starting and stopping
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # any caller could fill the log


def _registry() -> CollectorRegistry:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _bind(settings: Settings) -> socket.socket:
    """Take the port before anything slow is done. Raises `StartError` when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from None
    return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - reads it
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _greeting(url: str, repository: Repository) -> str:
    served = ", ".join(
        f"{model.name} version {model.version} on {model.engine.provider}"
        for model in repository.models.values()
    )
    sample = Path("samples/ship.jpg")
    photo = sample if sample.exists() else "photo.jpg"
    route = "/v1/classify" if repository.default else f"/v1/models/{next(iter(repository.models))}/classify"
    return (
        f"Fovea {__version__} serves {served} at {url}\n"
        f"  try   curl -T {photo} {url}{route}\n"
        f"  docs  {url}/docs"
    )


if __name__ == "__main__":
    sys.exit(main())
