"""The gRPC server beside the HTTP server: start, workers, keys, limits on connections, and the end."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fovea.service.access.caller import Scope
from fovea.service.access.keys_file import ApiKey, hash_key
from fovea.service.grpc import inference_pb2 as pb
from tests.certificates import Authority
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server, is_running, list_children, run_service, wait_until
from tests.service.grpc.channels import create_stub, grpc_address, open_channel, read_error
from tests.service.grpc.raw_calls import RawConnection

INFERENCE = "inference.GRPCInferenceService"

IMAGE = make_jpeg(64, 48, 1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `small`."""
    root = tmp_path_factory.mktemp("grpc") / "zoo"
    add_to_repository(build_model(), root)
    return root


def make_request() -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(IMAGE)
    return pb.ModelInferRequest(model_name="small", inputs=[tensor])


def infer(stub: Any, **options: Any) -> Any:
    return stub.ModelInfer(make_request(), timeout=30, **options)


# --- the start -----------------------------------------------------------------------------------


def test_without_a_port_nothing_is_imported(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        assert "gRPC" not in server.greeting
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "cygrpc" not in maps and "google/_upb" not in maps


def test_missing_extra_ends_the_start_with_one_sentence(zoo: Path) -> None:
    code = (
        "import importlib.util as util, sys; find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'grpc_health' else find(name)\n"
        "from fovea.service.__main__ import main; sys.exit(main())"
    )
    settings = {"FOVEA_MODELS": str(zoo), "FOVEA_PORT": "0", "FOVEA_GRPC_PORT": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "fovea: FOVEA_GRPC_PORT needs the extra `grpc`: the module grpc_health is not installed; "
        "run pip install 'fovea-serve[grpc]'"
    )


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_that_is_taken_ends_the_start(zoo: Path, workers: str) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0") as server:
        port = grpc_address(server).split(":")[1]
        result = run_service(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT=port, FOVEA_WORKERS=workers)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port} (FOVEA_GRPC_PORT): Address already in use" in result.stderr


@pytest.mark.long
def test_workers_share_the_port(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_WORKERS="2") as server:
        workers = list_children(server.process.pid)
        assert len(workers) == 2

        def call_over_new_connections() -> None:
            for _ in range(8):
                with open_channel(server, use_local_subchannel_pool=1) as channel:
                    infer(create_stub(channel))

        call_over_new_connections()
        labels = {"protocol": "grpc", "model": "small", "status": "200"}
        assert server.read_metric("fovea_requests_total", **labels) == 8
        for number, pid in enumerate(workers, 1):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
            server.client.close()  # it may have a connection to this worker
            server.client = httpx.Client(base_url=server.url, timeout=60)
            server.wait_for_metric(number, "fovea_worker_deaths_total")
            server.wait_for_metric(2, "fovea_workers")
            call_over_new_connections()
        assert not workers & list_children(server.process.pid)


# --- keys ----------------------------------------------------------------------------------------


def test_calls_need_a_key_with_the_scope_of_their_method(zoo: Path, tmp_path: Path) -> None:
    keys = {"reader": Scope.CLASSIFY, "manager": Scope.MANAGE}
    lines = [
        ApiKey(name, frozenset({scope}), hash_key(f"fovea_{name}".encode())).to_line()
        for name, scope in keys.items()
    ]
    file = tmp_path / "keys"
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o600)

    def bearer(name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer fovea_{name}"),)

    settings = {"FOVEA_GRPC_PORT": "0", "FOVEA_KEYS": str(file), "FOVEA_MANAGEMENT": "true"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server, open_channel(server) as channel:
        stub, health = create_stub(channel), health_pb2_grpc.HealthStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live  # probes send no key
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
        assert infer(stub, metadata=bearer("reader")).model_name == "small"
        assert infer(stub, metadata=(("x-api-key", "fovea_reader"),)).model_name == "small"
        load = pb.RepositoryModelLoadRequest(model_name="small")
        stub.RepositoryModelLoad(load, timeout=60, metadata=bearer("manager"))
        refusals: list[tuple[Any, Any, tuple[tuple[str, str], ...], grpc.StatusCode, str]] = [
            (stub.ModelInfer, make_request(), (), grpc.StatusCode.UNAUTHENTICATED, "unauthorized"),
            (stub.ModelInfer, make_request(), bearer("x"), grpc.StatusCode.UNAUTHENTICATED, "unauthorized"),
            (
                stub.ModelInfer,
                make_request(),
                bearer("manager"),
                grpc.StatusCode.PERMISSION_DENIED,
                "missing_scope",
            ),
            (
                stub.RepositoryModelLoad,
                load,
                bearer("reader"),
                grpc.StatusCode.PERMISSION_DENIED,
                "missing_scope",
            ),
            (
                stub.RepositoryIndex,
                pb.RepositoryIndexRequest(),
                (),
                grpc.StatusCode.UNAUTHENTICATED,
                "unauthorized",
            ),
        ]
        for method, request, metadata, status, code in refusals:
            with pytest.raises(grpc.RpcError) as info:
                method(request, timeout=30, metadata=metadata)
            found_status, message, trailers = read_error(info.value)
            assert (found_status, trailers["code"]) == (status, code), message
            assert trailers["www-authenticate"].startswith("Bearer")
            assert "fovea_" not in message
    assert "fovea_reader" not in server.log and '"reader"' in server.log


@pytest.mark.long
def test_every_method_but_the_probes_has_a_scope(zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ApiKey("x", frozenset({Scope.EXPLAIN}), hash_key(b"fovea_x")).to_line() + "\n")
    file.chmod(0o600)
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_KEYS=str(file)) as server,
        open_channel(server) as channel,
    ):
        answered = set()
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            call = channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}")
            try:
                list(call(iter([b""]), timeout=30))
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED, method.name
            else:
                answered.add(method.name)
    assert answered == {"ServerLive", "ServerReady", "ServerMetadata"}


def test_calls_whose_messages_do_not_arrive_leave_room_for_another_caller(zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    names = ("flood", "reader")
    keys = [ApiKey(name, frozenset({Scope.CLASSIFY}), hash_key(b"fovea_" + name.encode())) for name in names]
    file.write_text("".join(key.to_line() + "\n" for key in keys))
    file.chmod(0o600)
    settings = {
        "FOVEA_KEYS": str(file),
        "FOVEA_BODY_BYTES": "1000000",
        "FOVEA_BODIES_BYTES": "1000000",  # one message at a time
        "FOVEA_QUEUE_IMAGES": "32",
        "FOVEA_REQUEST_IMAGES": "32",
    }
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **settings) as server,
        open_channel(server, enable_retries=0) as channel,
        RawConnection(server) as connection,
    ):
        for _ in range(100):
            connection.start_call(f"/{INFERENCE}/ModelInfer".encode(), (b"x-api-key", b"fovea_flood"))
        wait_until(lambda: server.read_metric("fovea_errors_total", reason="overloaded") > 60)
        stub = create_stub(channel)
        assert infer(stub, metadata=(("x-api-key", "fovea_reader"),)).model_name == "small"


def test_one_caller_cannot_take_all_places_of_watchers(zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = ApiKey("second", frozenset({Scope.CLASSIFY}), hash_key(b"fovea_second"))
    file.write_text(key.to_line() + "\n")
    file.chmod(0o600)
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_KEYS=str(file)) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        health, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
        watches = [health.Watch(request, timeout=60) for _ in range(32)]
        assert [next(watch).status for watch in watches] == 32 * [health_pb2.HealthCheckResponse.SERVING]
        with pytest.raises(grpc.RpcError, match="too many clients watch"):
            next(health.Watch(request, timeout=60))
        metadata = (("x-api-key", "fovea_second"),)
        assert next(health.Watch(request, timeout=60, metadata=metadata)).status == 1
        for watch in watches:
            watch.cancel()
        wait_until(lambda: _can_watch(health))  # the places are free again


def _can_watch(health: Any) -> bool:
    watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(20)]
    try:
        return all(next(watch).status == 1 for watch in watches)
    except grpc.RpcError:
        return False
    finally:
        for watch in watches:
            watch.cancel()


# --- TLS -----------------------------------------------------------------------------------------


def test_port_speaks_tls_with_the_certificate_of_http(zoo: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **pair.settings) as server:
        address = grpc_address(server).replace("127.0.0.1", "localhost")

        def call_over_new_connection() -> bytes:
            credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
            with grpc.secure_channel(
                address, credentials, [("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                infer(create_stub(channel))
            return ssl.get_server_certificate(tuple(address.split(":"))).encode()  # type: ignore[arg-type]

        first = call_over_new_connection()
        with open_channel(server, enable_retries=0) as channel, pytest.raises(grpc.RpcError):
            create_stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=10)
        pair.replace_with(authority.issue("renewed"))
        assert call_over_new_connection() != first
        pair.key.write_text("broken")
        infer_again = call_over_new_connection()
        assert infer_again != first
    assert "the old one stays" in server.log


@pytest.mark.long
def test_clients_need_a_certificate_of_the_authority(zoo: Path, tmp_path: Path) -> None:
    authority, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    client = clients.issue("client")
    settings = {**authority.issue("server").settings, "FOVEA_TLS_CLIENT_CA": str(clients.file)}
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", **settings) as server:
        address = grpc_address(server).replace("127.0.0.1", "localhost")
        root = authority.file.read_bytes()
        with_certificate = grpc.ssl_channel_credentials(
            root, client.key.read_bytes(), client.certificate.read_bytes()
        )
        with grpc.secure_channel(address, with_certificate) as channel:
            infer(create_stub(channel))
        with (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(root)) as channel,
            pytest.raises(grpc.RpcError),
        ):
            create_stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=10)


# --- connections ---------------------------------------------------------------------------------


@pytest.mark.long
def test_number_of_connections_is_limited(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_GRPC_CONNECTIONS="2") as server:
        with ExitStack() as stack:
            stubs = [
                create_stub(stack.enter_context(open_channel(server, use_local_subchannel_pool=1)))
                for _ in range(2)
            ]
            for stub in stubs:
                assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live
            with open_channel(server, use_local_subchannel_pool=1, enable_retries=0) as channel:
                with pytest.raises(grpc.RpcError) as info:
                    create_stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=2)
                assert info.value.code() in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                )
            assert infer(stubs[0]).model_name == "small"
        with open_channel(server, use_local_subchannel_pool=1) as channel:
            live = create_stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=30, wait_for_ready=True)
            assert live.live


@pytest.mark.long
def test_connection_without_a_request_is_closed(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_HEADER_TIMEOUT="0.5") as server:
        host, port = grpc_address(server).split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            while connection.recv(4096):  # the server's own greeting, and then the end
                pass


# --- the end -------------------------------------------------------------------------------------


@contextmanager
def paused_runners(server: Server) -> Iterator[None]:
    """Pause the runners, so that accepted calls have no answer."""
    pids = server.runner_pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # the service has ended, and its runners with it
                os.kill(pid, signal.SIGCONT)


def test_shutdown_finishes_accepted_calls_and_refuses_new_ones(zoo: Path) -> None:
    settings = {"FOVEA_GRPC_PORT": "0", "FOVEA_RUNNERS": "1", "FOVEA_DRAIN_GRACE": "0.5"}
    with (
        Server(FOVEA_MODELS=str(zoo), **settings) as server,
        open_channel(server, enable_retries=0) as channel,
    ):
        stub, health = create_stub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with paused_runners(server):
            accepted = stub.ModelInfer.future(make_request(), timeout=60)
            server.wait_for_metric(1, "fovea_images_in_flight")
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError):  # the stream ends with the grace time
                next(watch)
            with pytest.raises(grpc.RpcError) as info:
                infer(stub)
            assert info.value.code() == grpc.StatusCode.UNAVAILABLE
        assert accepted.result().model_name == "small"
        wait_until(lambda: server.process.poll() is not None)
    assert server.process.returncode == 0
    assert "Traceback" not in server.log


@pytest.mark.long
def test_shutdown_cancels_calls_that_take_too_long(zoo: Path) -> None:
    settings = {"FOVEA_GRPC_PORT": "0", "FOVEA_RUNNERS": "1", "FOVEA_DRAIN_LIMIT": "0.5"}
    with (
        Server(FOVEA_MODELS=str(zoo), **settings) as server,
        open_channel(server, enable_retries=0) as channel,
        paused_runners(server),
    ):
        accepted = create_stub(channel).ModelInfer.future(make_request(), timeout=60)
        server.wait_for_metric(1, "fovea_images_in_flight")
        server.process.send_signal(signal.SIGTERM)
        assert accepted.exception().code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        # A runner that goes on earlier may answer the call after its client has left, before it is cancelled.
        wait_until(lambda: server.process.poll() is not None)
    assert server.process.returncode == 0
    assert '"reason":"draining"' in server.log and "Traceback" not in server.log
