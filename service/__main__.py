"""The composition root: the one place that touches the process (environment, signals, sockets, logs)."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import __version__, logs, loopwatch
from service.channel import Feed, encode
from service.errors import StartError, one_line
from service.layout import Served
from service.listener import Listener, Source, room
from service.settings import PREFIX, Settings, load_settings

# What serves is imported where it is used: a supervisor needs none of it, nor its 100 MB.
if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

    from service.remote import Remote
    from service.repository import Repository
    from service.server import Server

_WORKER: str = "--worker"


def main(**overrides: Any) -> int:
    """Serve until a signal ends it; return the exit code. `overrides` are settings by name."""
    _reserve_standard_streams()
    try:
        settings = load_settings(**overrides)
        _set_up_log(settings)
        bound = _bind(settings)
        if settings.workers == 1:
            _serve_alone(settings, bound)
        else:
            _supervise(settings, bound, overrides)
    except StartError as error:
        print(f"fovea: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


# --- one process -----------------------------------------------------------------------------------


def _serve_alone(settings: Settings, bound: socket.socket) -> None:
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # else the values would go to files
    from service.app import create_app

    app = create_app(settings, registry=_registry())
    listener = Listener(bound, room(settings.connections))

    async def serve() -> None:
        server = _server(app, settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.signal, number)
        greeting = _greeting(_url(settings, bound), **_served(app.state.classifier.repository))
        await server.serve(listener, listening=lambda: _greet(settings, greeting))

    _settle(settings)
    asyncio.run(serve())


def _server(app: FastAPI, settings: Settings) -> Server:
    from service.server import Server

    return Server(app, settings, observer=app.state.observer, lifecycle=app.state.lifecycle)


# --- several ---------------------------------------------------------------------------------------


def _supervise(settings: Settings, bound: socket.socket, overrides: Mapping[str, Any]) -> None:
    from service.multiprocess import FOLDER, metrics_folder
    from service.supervisor import Supervisor

    given = {PREFIX + name.upper(): str(value) for name, value in overrides.items()}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    listener = Listener(bound, room(settings.connections))
    with metrics_folder() as folder:
        supervisor = Supervisor(
            [sys.executable, "-P", "-m", "service", _WORKER],
            {**os.environ, **given, FOLDER: str(folder), "PYTHONPATH": path},
            settings,
            listener=listener,
            metrics=folder,
            listening=lambda served: _greet(settings, _greeting(_url(settings, bound), **served)),
        )
        asyncio.run(supervisor.run())


def work(channel: int) -> int:
    """Be a worker of the supervisor at the other end of `channel`; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they go to whole groups; the supervisor's word counts
    from service.remote import Remote

    end = socket.socket(fileno=channel)
    try:
        settings = load_settings()
        _set_up_log(settings)
        remote = Remote()
        app = _create_worker_app(settings, remote)
        _settle(settings)
        asyncio.run(_work(app, settings, end, remote))
    except StartError as error:
        end.send(encode(failed=one_line(error)))
        return 2
    return 0


def _create_worker_app(settings: Settings, remote: Remote) -> FastAPI:
    from prometheus_client import CollectorRegistry, disable_created_metrics

    from service.app import create_app
    from service.multiprocess import FOLDER, shared_registry

    disable_created_metrics()  # type: ignore[no-untyped-call]
    exposed = shared_registry(Path(os.environ[FOLDER]), os.getppid())
    served = Served.from_json(sys.stdin.read())
    return create_app(settings, registry=CollectorRegistry(), exposed=exposed, served=served, manager=remote)


async def _work(app: FastAPI, settings: Settings, end: socket.socket, remote: Remote) -> None:
    end.setblocking(False)
    server = _server(app, settings)
    feed = Feed(end, server.signal, remote.told)
    remote.attach(feed.tell, app.state.steward)
    source: Source = feed
    await server.serve(source, listening=lambda: feed.ready(**_served(app.state.classifier.repository)))
    if feed.orphaned:  # the supervisor was killed, and has left its folder behind
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


# --- the process -----------------------------------------------------------------------------------


def _reserve_standard_streams() -> None:
    """One that is closed would be the next socket that is opened, and be sent what libraries write to it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _set_up_log(settings: Settings) -> None:
    logs.set_up(settings.log_level, settings.log_format, settings.log_stream)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # any caller could fill the log; ours says it all
    for name in ("python_multipart", "opentelemetry.trace"):  # any caller could fill the log
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _settle(settings: Settings) -> None:
    """Everything is loaded: from here on the event loop must stay free."""
    gc.freeze()  # a full collection looks at 60,000 objects that never go, for 30 ms
    if settings.log_level == "debug":
        loopwatch.install()


def _registry() -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, PlatformCollector, disable_created_metrics

    from service.cgroup import Cgroup
    from service.processes import Container, Processes

    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(Processes(os.getpid()))
    registry.register(Container(Cgroup()))
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


def _served(repository: Repository) -> dict[str, str]:
    """What is served, and the route to try, in words."""
    models = repository.models
    names = ", ".join(f"{one.name} version {one.version} on {one.loaded.provider}" for one in models)
    named = not repository.default and models
    route = f"/v1/models/{models[0].name}/classify" if named else "/v1/classify"
    return {"names": names or "no model", "route": route}


def _greet(settings: Settings, greeting: str) -> None:
    """Print the greeting, to the stream that the log is not written to: whoever reads the log wants no other
    lines."""
    print(greeting, file=sys.stdout if settings.log_stream == "stderr" else sys.stderr, flush=True)


def _greeting(url: str, *, names: str, route: str) -> str:
    sample = Path("samples/ship.jpg")
    photo = sample if sample.exists() else "photo.jpg"
    return (
        f"Fovea {__version__} serves {names} at {url}\n"
        f"  try   curl -T {photo} {url}{route}\n"
        f"  page  {url}/ (API: {url}/docs)"
    )


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[2])) if sys.argv[1:2] == [_WORKER] else main())
