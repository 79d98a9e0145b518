"""Start, failed start and end of the process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import onnx
import pytest

from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server, run_service, wait_until


def _remove_file(path: Path) -> None:
    path.unlink()


def _truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _strip_contract(path: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


def _falsify_golden(path: Path) -> None:
    model = onnx.load(path)
    contract = read_contract(model)
    first, *others = contract.golden.images
    first = replace(first, logits=tuple(logit + 1 for logit in first.logits))
    golden = replace(contract.golden, images=(first, *others))
    onnx.save(with_contract(model, replace(contract, golden=golden)), path)


def _fix_batch(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_fix_batch, "the graph does not run"),
        (_remove_file, "has no <name>/<version>/model.onnx"),
        (_truncate_file, "ONNX Runtime cannot load the model"),
        (_strip_contract, "the model has no contract"),
        (_falsify_golden, "a logit is off by 1"),
    ],
)
def test_damaged_model_ends_with_one_error_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(add_to_repository(build_model(), tmp_path) / "small" / "1" / "model.onnx")
    process = run_service(FOVEA_MODELS=str(tmp_path), FOVEA_STRICT="true")
    _assert_one_line(process, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FOVEA_PROT": "1"}, "unknown setting FOVEA_PROT; did you mean FOVEA_PORT?"),
        ({"FOVEA_PORT": "high"}, "FOVEA_PORT is 'high'"),
        ({"FOVEA_MODELS": "/nowhere"}, "FOVEA_MODELS"),
        ({"FOVEA_DEFAULT_MODEL": "other"}, "FOVEA_DEFAULT_MODEL is 'other'; there are small"),
        ({"FOVEA_HOST": "256.0.0.1"}, "cannot listen on 256.0.0.1"),
        ({"FOVEA_HOST": "a..b"}, "cannot listen on a..b:0: not a host name"),
        ({"FOVEA_MODELS": "/dev/null"}, "cannot read the repository /dev/null: Not a directory"),
        ({"FOVEA_PROVIDER": "cuda"}, "FOVEA_PROVIDER is cuda"),
    ],
)
def test_bad_setting_ends_with_one_error_line(
    small_zoo: Path, settings: dict[str, str], message: str
) -> None:
    _assert_one_line(run_service(**{"FOVEA_MODELS": str(small_zoo), **settings}), message)


def test_occupied_port_ends_with_one_error_line(small_zoo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        _assert_one_line(run_service(FOVEA_MODELS=str(small_zoo), FOVEA_PORT=port), f"127.0.0.1:{port}")


def _assert_one_line(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("fovea: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.long
def test_lost_race_for_port_ends_with_one_error_line(small_zoo: Path) -> None:
    """Both processes may bind before either listens. Here the second binds before the first listens."""
    code = (
        "import socket, sys\n"
        "import fovea.service.__main__ as root, fovea.service.app as app_module\n"
        "made = app_module.create_app\n"
        "def late(settings, **options):\n"
        "    app = made(settings, **options)\n"
        "    socket_of_other.listen()\n"
        "    return app\n"
        "socket_of_other = socket.socket()\n"
        "socket_of_other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "socket_of_other.bind(('127.0.0.1', 0))\n"
        "app_module.create_app = late\n"
        "sys.exit(root.main(port=socket_of_other.getsockname()[1], log_level='error'))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FOVEA_MODELS": str(small_zoo)},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    _assert_one_line(process, "cannot listen: Address already in use")


def _open_full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _open_broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def _open_full_pipe() -> int:
    """Return the write end of a full pipe that is never read."""
    _, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        os.set_blocking(write, True)
    return write


@pytest.mark.long
@pytest.mark.parametrize("open_stdout", [_open_full, _open_broken_pipe, _open_full_pipe])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_unwritable_greeting_does_not_disturb_service(
    small_zoo: Path, open_stdout: Callable[[], int], workers: str
) -> None:
    descriptor = open_stdout()
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))  # reserves the port, and the service may bind it too
        port = reservation.getsockname()[1]
        settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_PORT": str(port), "FOVEA_DRAIN_GRACE": "0"}
        process = subprocess.Popen(
            [sys.executable, "-m", "fovea.service"], env={**os.environ, **settings, "FOVEA_WORKERS": workers},
            cwd=ROOT, stdout=descriptor, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: _is_ready(port) or process.poll() is not None)
            assert httpx.post(f"http://127.0.0.1:{port}/v1/classify", content=make_jpeg()).status_code == 200
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(descriptor)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("open_stderr", [_open_full, _open_broken_pipe, _open_full_pipe])
def test_unwritable_error_line_keeps_exit_code_2(open_stderr: Callable[[], int]) -> None:
    descriptor = open_stderr()
    process = subprocess.run(
        [sys.executable, "-m", "fovea.service"], env={**os.environ, "FOVEA_PORT": "high"}, cwd=ROOT,
        stderr=descriptor, timeout=300, check=False,
    )  # fmt: skip
    os.close(descriptor)
    assert process.returncode == 2


@pytest.mark.long
def test_ipv6_greeting_has_a_working_url(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_HOST="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert server.client.get("/health/ready").status_code == 200


@pytest.mark.long
def test_model_file_is_served_as_a_repository(small_zoo: Path) -> None:
    path = small_zoo / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path)) as server:
        assert server.client.get("/v1/models").json()["models"][0]["name"] == "small"


@pytest.mark.long
def test_version_folder_without_model_file_is_not_served(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path)
    (tmp_path / "small" / "2").mkdir()
    (tmp_path / "small" / "latest").mkdir()
    (tmp_path / "README").write_text("not a model")
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        assert server.client.get("/v1/models").json()["models"][0]["version"] == "1"
    assert "small/2 has no model.onnx and is not served" in server.log


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_signal_ends_service_cleanly(small_zoo: Path, signal_number: int) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        server.process.send_signal(signal_number)
        assert server.process.wait(timeout=60) == 0
        with pytest.raises(httpx.TransportError):
            server.client.get("/health/live")
    assert "Traceback" not in server.log


@pytest.mark.long
def test_internal_error_is_500_with_details_only_in_log(small_zoo: Path, tmp_path: Path) -> None:
    """The test replaces a method of ONNX Runtime, so that the runner raises."""
    (tmp_path / "sitecustomize.py").write_text(
        "import onnxruntime\n"
        "real = onnxruntime.InferenceSession.run\n"
        "def run(self, names, feeds, options=None):\n"
        "    if feeds['pixels'].max() == 7:\n"
        "        raise RuntimeError('secret detail')\n"
        "    return real(self, names, feeds, options)\n"
        "onnxruntime.InferenceSession.run = run\n"
    )
    from PIL import Image

    from tests.pictures import encode_image

    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Server(FOVEA_MODELS=str(small_zoo), PYTHONPATH=path) as server:
        image = encode_image(Image.new("RGB", (16, 16), (7, 7, 7)), "PNG")
        reply = server.client.post("/v1/classify", content=image)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in reply.text
        assert server.read_metric("fovea_errors_total", reason="internal") == 1
        assert server.read_metric("fovea_requests_in_flight") == 1
        assert server.read_metric("fovea_images_in_flight") == 0
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
    assert "secret detail" in server.log
    assert reply.headers["X-Request-ID"] in server.log


def test_onnx_runtime_writes_no_telemetry_files(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry, if enabled, creates files in the user's cache."""
    subprocess.run(
        [sys.executable, "-c", "import fovea.service.inference.engine"],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []


def test_service_imports_without_training_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors', 'fovea.model', 'fovea.export'):\n"
        "    sys.modules[name] = None\n"
        "import fovea.service.app, fovea.service.__main__, fovea.service.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_service_process_does_not_import_onnx_runtime() -> None:
    """Only runners and trials load it: it takes 40 MB, and half a second of each start."""
    code = "import sys, fovea.service.app; print([name for name in sys.modules if 'onnxruntime' in name])"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"
