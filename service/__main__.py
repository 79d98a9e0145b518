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
from fovea.service.errors import StartError, to_one_line

# All other imports happen where they are used. The signal handlers must be installed before anything slow,
# and a supervisor needs none of the serving code, which takes 100 MB.
if TYPE_CHECKING:
    import socket

    from prometheus_client import CollectorRegistry

    from fovea.service.app import Application
    from fovea.service.artifact.repository import ServingState
    from fovea.service.http.listener import ConnectionSource
    from fovea.service.http.server import Server
    from fovea.service.rollout.refusals import Refusals
    from fovea.service.serving.catalog import ModelCatalog
    from fovea.service.settings import Settings
    from fovea.service.supervisor.participant import Participant

_WORKER_OPTION: str = "--worker"

_FILES_PER_WORKER: Final = 16
"""Number of file descriptors that the supervisor needs per worker: the channel, the metrics and a start."""

_WRITE_TIMEOUT: Final = 1.0
"""Time limit in seconds for writing a line to a stream that nobody may be reading."""


def main(**overrides: Any) -> int:
    """Serve until a signal ends the process, and return the exit code.

    `overrides` are settings by name.
    """
    signals.install_start_handlers()
    _reserve_standard_streams()
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # otherwise `prometheus_client` would write files there
    from fovea.service import allocator
    from fovea.service.http.log_setup import configure_logs
    from fovea.service.rollout.startup import start_serving
    from fovea.service.runners import child_process, memory_plan
    from fovea.service.settings import load_service_settings

    allocator.configure_allocator()
    grpc_socket = None
    try:
        settings = load_service_settings(**overrides)
        configure_logs(settings)
        _check_certificate(settings)
        bound_socket = _bind_port(settings)
        settings, grpc_socket = _reserve_grpc_port(settings)
        settings = memory_plan.fit_to_memory(_fetch_models(settings))
        if settings.workers == 1:
            child_process.start_fork_server()
            start_serving(settings, lambda *start: _serve_single_process(settings, bound_socket, *start))
        else:
            if grpc_socket:  # the workers must know a port that was free
                overrides["grpc_port"] = settings.grpc_port
            start_serving(settings, lambda *start: _run_supervisor(settings, bound_socket, overrides, *start))
    except StartError as error:
        _write_line(2, f"fovea: {to_one_line(error)}")
        return 2
    finally:
        if grpc_socket:
            grpc_socket.close()
    return 0


# --- one process -----------------------------------------------------------------------------------


def _serve_single_process(
    settings: Settings, bound_socket: socket.socket, serving_state: ServingState, refusals: Refusals
) -> None:
    import asyncio

    from fovea.service.app import create_app
    from fovea.service.http.lifecycle import KILL_DELAY, force_exit_after
    from fovea.service.http.listener import Listener, get_connection_limit, raise_file_limit

    raise_file_limit(_count_connections(settings))
    app = create_app(settings, registry=_create_registry(), serving_state=serving_state, refusals=refusals)
    processes = app.observer.metrics.process_metrics
    processes.workers_expected.set(1)
    listener = Listener(
        bound_socket, get_connection_limit(settings.connections), processes.connections_starved.inc
    )

    async def run_server() -> None:
        server = _create_server(app, settings)
        loop = asyncio.get_running_loop()
        greeting = _format_greeting(
            _format_url(settings, bound_socket), settings, **_describe_models(app.classifier.catalog)
        )
        reload_tasks = set()
        stop_signals: list[int] = []

        def handle_stop_signal(number: int) -> None:
            server.handle_signal(number)
            if not stop_signals:
                force_exit_after(settings.drain_grace + settings.drain_limit + KILL_DELAY)
            stop_signals.append(number)

        def reload_models() -> None:
            task = loop.create_task(app.watcher.reload())
            reload_tasks.add(task)
            task.add_done_callback(reload_tasks.discard)

        def on_listening() -> None:
            signals.install_serving_handlers(handle_stop_signal, reload_models)
            processes.workers.set(1)
            _print_greeting(settings, greeting)

        # The server calls `on_listening` on the event loop once it accepts connections. From then on signals
        # stop the service in order; before that they end the process at once.
        await server.serve(listener, on_listening=on_listening)

    _prepare_serving(settings)
    asyncio.run(run_server())


def _create_server(app: Application, settings: Settings) -> Server:
    from fovea.service.http.server import Server

    return Server(
        app.asgi,
        app.fast_app,
        settings,
        body_memory=app.classifier.body_memory,
        observer=app.observer,
        lifecycle=app.lifecycle,
        further_server=app.grpc_server,
    )


# --- several workers -------------------------------------------------------------------------------


def _run_supervisor(
    settings: Settings,
    bound_socket: socket.socket,
    overrides: Mapping[str, Any],
    serving_state: ServingState,
    refusals: Refusals,
) -> None:
    import asyncio

    from fovea.service.access.caller_limits import has_caller_limits
    from fovea.service.access.caller_table import create_table_file
    from fovea.service.access.key_watcher import KeyWatcher
    from fovea.service.http.listener import Listener, get_connection_limit
    from fovea.service.observability.multiprocess import SharedMetrics
    from fovea.service.runners.child_process import stop_fork_server
    from fovea.service.settings import ENVIRONMENT_PREFIX
    from fovea.service.supervisor.supervisor import Supervisor

    stop_fork_server()  # versions may have been tried; from here on each worker has a fork server of its own
    override_variables = {ENVIRONMENT_PREFIX + name.upper(): str(value) for name, value in overrides.items()}
    python_path = os.pathsep.join(
        filter(None, (str(Path(fovea.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    )
    try:
        metrics = SharedMetrics()
        caller_file = create_table_file(settings.workers) if has_caller_limits(settings) else None
    except OSError as error:
        raise StartError(f"cannot create the shared memory of the workers: {error.strerror}") from None
    max_connections = get_connection_limit(
        settings.connections, reserved_files=_FILES_PER_WORKER * settings.workers
    )
    listener = Listener(bound_socket, max_connections, metrics.process_metrics.connections_starved.inc)
    supervisor = Supervisor(
        [sys.executable, "-P", "-m", "fovea.service", _WORKER_OPTION],
        {**os.environ, **override_variables, "PYTHONPATH": python_path},
        settings,
        listener=listener,
        metrics=metrics,
        serving_state=serving_state,
        refusals=refusals,
        caller_file=caller_file,
        key_watcher=KeyWatcher(settings.keys) if settings.keys else None,
        on_listening=lambda ready: _print_greeting(
            settings,
            _format_greeting(
                _format_url(settings, bound_socket), settings, names=ready.names, route=ready.route
            ),
        ),
    )
    asyncio.run(supervisor.run())


def run_worker(caller_column: int, channel_descriptor: int, metrics_index: int, *descriptors: int) -> int:
    """Run as a worker of the supervisor at the other end of `channel_descriptor`, and return the exit code.

    The worker keeps its metrics in the first `descriptors`, one for each of `METRIC_KINDS`. The file
    `metrics_index` lists the metric files of all workers. If there are limits of callers, the last descriptor
    is the table of callers, in which the worker owns `caller_column`.
    """
    # Signals go to the whole process group, but only the supervisor tells a worker to stop.
    signals.ignore_signals()
    import asyncio
    import socket

    from fovea.service.supervisor.channel import send_heartbeats
    from fovea.service.supervisor.messages import StartFailure

    channel_socket = socket.socket(fileno=channel_descriptor)
    try:
        with send_heartbeats(channel_socket):
            from fovea.service import allocator
            from fovea.service.http.log_setup import configure_logs
            from fovea.service.runners import child_process, memory_plan
            from fovea.service.settings import load_service_settings
            from fovea.service.supervisor.participant import Participant

            allocator.configure_allocator()
            settings = load_service_settings()
            configure_logs(settings)
            settings = memory_plan.fit_to_memory(settings)
            child_process.start_fork_server()
            # The application needs its manager now, but the channel to the supervisor is attached only when
            # the event loop runs, see `_serve_worker`.
            participant = Participant()
            app = _create_worker_app(settings, participant, caller_column, metrics_index, descriptors)
            _prepare_serving(settings)
        asyncio.run(_serve_worker(app, settings, channel_socket, participant))
    except StartError as error:
        channel_socket.send(StartFailure(to_one_line(error)).to_bytes())
        return 2
    return 0


def _create_worker_app(
    settings: Settings,
    participant: Participant,
    caller_column: int,
    metrics_index: int,
    descriptors: Sequence[int],
) -> Application:
    from prometheus_client import CollectorRegistry, disable_created_metrics

    from fovea.service.access.caller_table import CallerTable
    from fovea.service.app import create_app
    from fovea.service.observability.multiprocess import (
        METRIC_KINDS,
        MetricFiles,
        create_shared_registry,
        use_metric_files,
    )
    from fovea.service.runners.frames import FrameDecoder
    from fovea.service.supervisor.messages import ServeCommand

    disable_created_metrics()  # type: ignore[no-untyped-call]
    own_files = MetricFiles(descriptors[: len(METRIC_KINDS)])
    caller_files = descriptors[len(METRIC_KINDS) :]
    use_metric_files(own_files)
    exposed_registry = create_shared_registry(metrics_index, own_files, os.getppid())
    (frame,) = FrameDecoder().feed(sys.stdin.buffer.read())
    return create_app(
        settings,
        registry=CollectorRegistry(),
        exposed_registry=exposed_registry,
        serving_state=ServeCommand.from_frame(frame).to_state(),
        keys=bytes(frame.content) or None,
        participant=participant,
        caller_table=CallerTable.open(caller_files[0], column=caller_column) if caller_files else None,
    )


async def _serve_worker(
    app: Application, settings: Settings, channel_socket: socket.socket, participant: Participant
) -> None:
    from fovea.service.http.listener import raise_file_limit
    from fovea.service.supervisor.channel import SupervisedSource
    from fovea.service.supervisor.messages import ReadyReport

    server = _create_server(app, settings)
    raise_file_limit(_count_connections(settings))
    starvation_counter = app.observer.metrics.process_metrics.connections_starved
    # The source receives connections and messages from the supervisor: signals go to the server, all other
    # messages to `participant`, which sends its own messages through the source. Attach the participant
    # before the source starts, because the first message may arrive at once.
    supervised_source = SupervisedSource(
        channel_socket,
        on_signal=server.handle_signal,
        on_message=participant.handle_message,
        on_starved=starvation_counter.inc,
        on_gone=participant.fail_pending,
    )
    participant.attach(supervised_source.send_message, app.manager)
    source: ConnectionSource = supervised_source
    await server.serve(
        source,
        on_listening=lambda: supervised_source.send_message(
            ReadyReport(**_describe_models(app.classifier.catalog))
        ),
    )


# --- set-up of the process -------------------------------------------------------------------------


def _reserve_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next socket would take the free descriptor and receive what libraries write to that stream.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _write_line(descriptor: int, text: str) -> None:
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
    writer.join(_WRITE_TIMEOUT)


def _prepare_serving(settings: Settings) -> None:
    """Prepare the process for serving, after everything is loaded.

    From here on the event loop must not be blocked.
    """
    import gc

    from fovea.service import allocator
    from fovea.service.observability import slow_callbacks

    allocator.trim_heap()
    allocator.release_code_pages()
    gc.freeze()  # a full collection takes 30 ms to scan 60,000 permanent objects
    if settings.log_level == "debug":
        slow_callbacks.log_slow_callbacks()


def _create_registry() -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, PlatformCollector, disable_created_metrics

    from fovea.service.observability.process_metrics import ContainerCollector, ProcessTreeCollector
    from fovea.service.resources.cgroup import Cgroup

    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(ProcessTreeCollector(os.getpid()))
    registry.register(ContainerCollector(Cgroup()))
    PlatformCollector(registry=registry)
    return registry


def _fetch_models(settings: Settings) -> Settings:
    """Copy the models from a store, if FOVEA_MODELS is the URI of one. Raises `StartError`."""
    if settings.store_uri is None:
        return settings
    from fovea.service.rollout.store_sync import fetch_models

    return fetch_models(settings)


def _check_certificate(settings: Settings) -> None:
    """Raise `StartError` for a certificate that cannot be used, before anything slow is done."""
    if settings.tls_cert:
        from fovea.service.http.certificates import CertificateFiles, load_context

        if files := CertificateFiles.from_settings(settings):
            load_context(files)


def _bind_port(settings: Settings) -> socket.socket:
    """Bind the port before anything slow is done.

    Raises `StartError` when the port cannot be bound.
    """
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound_socket = socket.socket(family, kind, protocol)
        bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_socket.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from None
    return bound_socket


def _count_connections(settings: Settings) -> int:
    """Return the largest number of connections of this process, over HTTP and over gRPC."""
    return settings.connections + (settings.grpc_connections if settings.grpc_port is not None else 0)


def _reserve_grpc_port(settings: Settings) -> tuple[Settings, socket.socket | None]:
    """Reserve the port of gRPC, and return the settings with this port, and the socket that holds it.

    Raises `StartError`.
    """
    if settings.grpc_port is None:
        return settings, None
    from fovea.service.grpc.port import reserve_port

    # gRPC writes its own lines to stderr, which are not JSON. Workers inherit the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    reserved = reserve_port(settings)
    return settings.model_copy(update={"grpc_port": reserved.getsockname()[1]}), reserved


def _format_url(settings: Settings, bound_socket: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - only compares
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound_socket.getsockname()[1]}"


def _describe_models(catalog: ModelCatalog) -> dict[str, str]:
    """Return the served models and the route to try, as text for the greeting."""
    models = catalog.models
    names = ", ".join(f"{one.name} version {one.version} on {one.load_result.provider}" for one in models)
    needs_name = not catalog.default and models
    route = f"/v1/models/{models[0].name}/classify" if needs_name else "/v1/classify"
    return {"names": names or "no model", "route": route}


def _print_greeting(settings: Settings, greeting: str) -> None:
    """Print the greeting to the standard stream that the log does not use.

    The stream of the log contains nothing but log lines.
    """
    _write_line(1 if settings.log_stream == "stderr" else 2, greeting)


def _format_greeting(url: str, settings: Settings, *, names: str, route: str) -> str:
    grpc_port = f" and gRPC on port {settings.grpc_port}" if settings.grpc_port is not None else ""
    sample = Path("samples/ship.jpg")
    photo = sample if sample.exists() else "photo.jpg"
    return (
        f"Fovea {__version__} serves {names} at {url}{grpc_port}\n"
        f"  try   curl -T {photo} {url}{route}\n"
        f"  page  {url}/ (API: {url}/docs)"
    )


if __name__ == "__main__":
    sys.exit(run_worker(*map(int, sys.argv[2:])) if sys.argv[1:2] == [_WORKER_OPTION] else main())
