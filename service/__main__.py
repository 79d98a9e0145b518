"""The composition root: the only module that touches the process (environment, signals, sockets, logs)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import fovea
from fovea.service import __version__, signals
from fovea.service.errors import StartError, one_line

# All other imports happen where they are used. The signal handlers must be installed before anything slow,
# and a supervisor needs none of the serving code, which takes 100 MB.
if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry

    from fovea.service.artifact.repository import ServingState
    from fovea.service.http.listener import Source
    from fovea.service.http.server import Server
    from fovea.service.rollout.refusals import Refusals
    from fovea.service.serving.registry import ModelRegistry
    from fovea.service.settings import Settings
    from fovea.service.supervisor.participant import Remote

_WORKER: str = "--worker"

_FILES_OF_WORKER: Final = 16
"""Number of files that the supervisor needs per worker: the channel, its metrics and those of a start."""

_PATIENCE: Final = 1.0
"""Time limit in seconds for writing a line to a stream that nobody may be reading."""


def main(**overrides: Any) -> int:
    """Serve until a signal ends the process, and return the exit code.

    `overrides` are settings by name.
    """
    signals.prepare()
    _reserve_standard_streams()
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # otherwise `prometheus_client` would write files there
    from fovea.service import allocator
    from fovea.service.rollout.startup import start_serving
    from fovea.service.runners import memory_plan
    from fovea.service.settings import load_settings

    allocator.return_memory()
    try:
        settings = load_settings(**overrides)
        _set_up_log(settings)
        settings = memory_plan.fit_to_memory(settings)
        bound = _bind(settings)
        if settings.workers == 1:
            start_serving(settings, lambda *served: _serve_alone(settings, bound, *served))
        else:
            start_serving(settings, lambda *served: _supervise(settings, bound, overrides, *served))
    except StartError as error:
        _say(2, f"fovea: {one_line(error)}")
        return 2
    return 0


# --- one process -----------------------------------------------------------------------------------


def _serve_alone(settings: Settings, bound: socket.socket, served: ServingState, refusals: Refusals) -> None:
    import asyncio

    from fovea.service.app import create_app
    from fovea.service.http.lifecycle import OVERDUE, end_within
    from fovea.service.http.listener import Listener, room

    app = create_app(settings, registry=_registry(), served=served, refusals=refusals)
    processes = app.state.observer.metrics.processes
    processes.workers_expected.set(1)
    listener = Listener(bound, room(settings.connections), processes.connections_starved.inc)

    async def serve() -> None:
        server = _server(app, settings)
        loop = asyncio.get_running_loop()
        greeting = _greeting(_url(settings, bound), **_served(app.state.classifier.repository))
        reloads = set()
        stops: list[int] = []

        def stop(number: int) -> None:
            server.signal(number)
            if not stops:
                end_within(settings.drain_grace + settings.drain_limit + OVERDUE)
            stops.append(number)

        def reload() -> None:
            task = loop.create_task(app.state.watch.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        def listening() -> None:
            signals.serve(stop, reload)
            processes.workers.set(1)
            _greet(settings, greeting)

        # The server calls `listening` once it accepts connections. From then on signals stop the service in
        # order; before that they end the process at once.
        await server.serve(listener, listening=listening)

    _settle(settings)
    asyncio.run(serve())


def _server(app: FastAPI, settings: Settings) -> Server:
    from fovea.service.http.server import Server

    return Server(app, settings, observer=app.state.observer, lifecycle=app.state.lifecycle)


# --- several workers -------------------------------------------------------------------------------


def _supervise(
    settings: Settings,
    bound: socket.socket,
    overrides: Mapping[str, Any],
    served: ServingState,
    refusals: Refusals,
) -> None:
    import asyncio

    from fovea.service.http.listener import Listener, room
    from fovea.service.observability.multiprocess import SharedMetrics
    from fovea.service.settings import PREFIX
    from fovea.service.supervisor.supervisor import Supervisor

    given = {PREFIX + name.upper(): str(value) for name, value in overrides.items()}
    path = os.pathsep.join(filter(None, (str(Path(fovea.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    try:
        metrics = SharedMetrics()
    except OSError as error:
        raise StartError(f"no memory for the metrics of several workers: {error.strerror}") from None
    files = room(settings.connections, reserved=_FILES_OF_WORKER * settings.workers)
    listener = Listener(bound, files, metrics.process_metrics.connections_starved.inc)
    supervisor = Supervisor(
        [sys.executable, "-P", "-m", "fovea.service", _WORKER],
        {**os.environ, **given, "PYTHONPATH": path},
        settings,
        listener=listener,
        metrics=metrics,
        served=served,
        refusals=refusals,
        listening=lambda served: _greet(settings, _greeting(_url(settings, bound), **served)),
    )
    asyncio.run(supervisor.run())


def work(channel: int, index: int, *files: int) -> int:
    """Run as a worker of the supervisor at the other end of `channel`, and return the exit code.

    The worker keeps its metrics in `files`. The file `index` lists the metric files of all workers.
    """
    signals.ignore()  # signals go to the whole process group; only the supervisor tells a worker to stop
    import asyncio
    import socket

    from fovea.service.supervisor.channel import encode, heard

    end = socket.socket(fileno=channel)
    try:
        with heard(end):
            from fovea.service import allocator
            from fovea.service.runners import memory_plan
            from fovea.service.settings import load_settings
            from fovea.service.supervisor.participant import Remote

            allocator.return_memory()
            settings = load_settings()
            _set_up_log(settings)
            settings = memory_plan.fit_to_memory(settings)
            # The application needs its manager now, but the channel to the supervisor is attached only when
            # the event loop runs, see `_work`.
            remote = Remote()
            app = _create_worker_app(settings, remote, index, files)
            _settle(settings)
        asyncio.run(_work(app, settings, end, remote))
    except StartError as error:
        end.send(encode(failed=one_line(error)))
        return 2
    return 0


def _create_worker_app(settings: Settings, remote: Remote, index: int, files: Sequence[int]) -> FastAPI:
    from prometheus_client import CollectorRegistry, disable_created_metrics

    from fovea.service.app import create_app
    from fovea.service.artifact.repository import ServingState
    from fovea.service.observability.multiprocess import MetricFiles, create_shared_registry, use_metric_files

    disable_created_metrics()  # type: ignore[no-untyped-call]
    own = MetricFiles(files)
    use_metric_files(own)
    exposed = create_shared_registry(index, own, os.getppid())
    served = ServingState.from_json(sys.stdin.read())
    return create_app(settings, registry=CollectorRegistry(), exposed=exposed, served=served, manager=remote)


async def _work(app: FastAPI, settings: Settings, end: socket.socket, remote: Remote) -> None:
    from fovea.service.http.listener import prepare_room
    from fovea.service.supervisor.channel import Feed

    end.setblocking(False)
    server = _server(app, settings)
    prepare_room(settings.connections)
    starved = app.state.observer.metrics.processes.connections_starved
    # The feed receives connections and messages from the supervisor: signals go to the server, all other
    # messages to `remote`, which sends its own messages through the feed.
    feed = Feed(end, server.signal, remote.told, starved.inc)
    remote.attach(feed.tell, app.state.steward)
    source: Source = feed
    await server.serve(source, listening=lambda: feed.ready(**_served(app.state.classifier.repository)))


# --- set-up of the process -------------------------------------------------------------------------


def _reserve_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next socket would take the free descriptor and receive what libraries write to that stream.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _say(descriptor: int, text: str) -> None:
    """Write a line to a standard stream, and drop the line if it cannot be written in time.

    A stream that is full, closed or not read does not end the process.
    """
    import threading

    def write() -> None:
        line = f"{text}\n".encode(errors="replace")
        with suppress(OSError):
            while line:
                line = line[os.write(descriptor, line) :]

    # The thread is a daemon because a write to a pipe that nobody reads blocks for ever.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_PATIENCE)


def _set_up_log(settings: Settings) -> None:
    import logging

    from fovea.service.http import access_log

    access_log.set_up(settings.log_level, settings.log_format, settings.log_stream)
    # Any client could fill the log through these loggers. Our own log has everything that uvicorn reports.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    for name in ("python_multipart", "opentelemetry.trace"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _settle(settings: Settings) -> None:
    """Prepare the process for serving, after everything is loaded.

    From here on the event loop must not be blocked.
    """
    import gc

    from fovea.service.observability import slow_callbacks

    gc.freeze()  # a full collection takes 30 ms to scan 60,000 permanent objects
    if settings.log_level == "debug":
        slow_callbacks.log_slow_callbacks()


def _registry() -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, PlatformCollector, disable_created_metrics

    from fovea.service.observability.process_metrics import ContainerCollector, ProcessTreeCollector
    from fovea.service.resources.cgroup import Cgroup

    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(ProcessTreeCollector(os.getpid()))
    registry.register(ContainerCollector(Cgroup()))
    PlatformCollector(registry=registry)
    return registry


def _bind(settings: Settings) -> socket.socket:
    """Bind the port before anything slow is done.

    Raises `StartError` when the port cannot be bound.
    """
    import socket

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
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - only compares
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _served(repository: ModelRegistry) -> dict[str, str]:
    """Return the served models and the route to try, as text for the greeting."""
    models = repository.models
    names = ", ".join(f"{one.name} version {one.version} on {one.load_result.provider}" for one in models)
    named = not repository.default and models
    route = f"/v1/models/{models[0].name}/classify" if named else "/v1/classify"
    return {"names": names or "no model", "route": route}


def _greet(settings: Settings, greeting: str) -> None:
    """Print the greeting to the standard stream that the log does not use.

    The stream of the log contains nothing but log lines.
    """
    _say(1 if settings.log_stream == "stderr" else 2, greeting)


def _greeting(url: str, *, names: str, route: str) -> str:
    sample = Path("samples/ship.jpg")
    photo = sample if sample.exists() else "photo.jpg"
    return (
        f"Fovea {__version__} serves {names} at {url}\n"
        f"  try   curl -T {photo} {url}{route}\n"
        f"  page  {url}/ (API: {url}/docs)"
    )


if __name__ == "__main__":
    sys.exit(work(*map(int, sys.argv[2:])) if sys.argv[1:2] == [_WORKER] else main())
