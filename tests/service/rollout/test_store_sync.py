"""Services of models by URI: a folder as a store, and a real S3 server if its packages are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server, run_service, wait_until
from tests.tools import SYSTEM_REASON, find_tool

needs_s3 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("s3fs", "moto")),
    reason=f"{SYSTEM_REASON}has no S3: pip install s3fs 'moto[server,s3]'",
)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A repository that is used as a store, with one version."""
    return add_to_repository(build_model(), tmp_path / "bucket", "pets", "1")


def add_version(bucket: Path, version: str, tmp_path: Path) -> None:
    """Add a version in one step, as object stores do."""
    add_to_repository(build_model(seed=int(version)), tmp_path / f"made{version}", "pets", version)
    (tmp_path / f"made{version}" / "pets" / version).rename(bucket / "pets" / version)


@contextmanager
def serve_store(uri: str, tmp_path: Path, **settings: str) -> Iterator[Server]:
    with (
        (tmp_path / "log").open("a") as log,
        Server(
            {"stderr": log},
            FOVEA_MODELS=uri,
            FOVEA_MODEL_CACHE=str(tmp_path / "cache"),
            FOVEA_STORE_POLL="0.3",
            FOVEA_WATCH="0.2",
            **settings,
        ) as server,
    ):
        yield server


def read_version(server: Server) -> str:
    models = server.client.get("/v1/models").json()["models"]
    return str(models[0]["version"]) if models else ""


def classify(server: Server) -> int:
    return server.client.post("/v1/classify", content=make_jpeg()).status_code


def count_updates(server: Server, result: str) -> float:
    return server.read_metric("fovea_store_updates_total", result=result)


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_store_is_as_good_as_a_folder(bucket: Path, tmp_path: Path, workers: str) -> None:
    with serve_store(f"file://{bucket}", tmp_path, FOVEA_WORKERS=workers) as server:
        assert read_version(server) == "1"
        assert server.read_metric("fovea_store_updated_timestamp_seconds") > 1e9
        add_version(bucket, "2", tmp_path)  # swap
        wait_until(lambda: read_version(server) == "2")
        (bucket / "pets" / "3").mkdir()
        (bucket / "pets" / "3" / "model.onnx").write_bytes(b"half of a model")  # refusal
        wait_until(lambda: server.client.get("/v1/models").json()["refused"])
        assert (read_version(server), classify(server)) == ("2", 200)
        shutil.rmtree(bucket / "pets" / "3")
        shutil.rmtree(bucket / "pets" / "2")  # roll back
        wait_until(lambda: read_version(server) == "1")
        assert classify(server) == 200


@pytest.mark.long
def test_lost_store_changes_nothing_but_is_seen(bucket: Path, tmp_path: Path) -> None:
    with serve_store(f"file://{bucket}", tmp_path) as server:
        updated = server.read_metric("fovea_store_updated_timestamp_seconds")
        bucket.rename(tmp_path / "gone")
        wait_until(lambda: count_updates(server, "failed") >= 2)
        assert (read_version(server), classify(server)) == ("1", 200)
        assert server.client.get("/health/ready").status_code == 200
        (tmp_path / "gone").rename(bucket)
        add_version(bucket, "2", tmp_path)
        wait_until(lambda: read_version(server) == "2")
        assert server.read_metric("fovea_store_updated_timestamp_seconds") > updated
    log = (tmp_path / "log").read_text()
    assert log.count("the copy is served as it is") == 1  # once, and not at each look
    assert log.count("can be read again") == 1


@pytest.mark.long
def test_start_without_the_store_serves_the_copy_or_says_why_not(bucket: Path, tmp_path: Path) -> None:
    uri = f"file://{bucket}"
    with serve_store(uri, tmp_path):
        pass
    bucket.rename(tmp_path / "gone")
    with serve_store(uri, tmp_path) as server:
        assert (read_version(server), classify(server)) == ("1", 200)
    assert "the copy of an earlier start is served" in (tmp_path / "log").read_text()
    result = run_service(FOVEA_MODELS=uri, FOVEA_MODEL_CACHE=str(tmp_path / "empty"), FOVEA_LOG_LEVEL="error")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"fovea: FOVEA_MODELS is '{uri}', and there is no copy")
    assert "Traceback" not in result.stderr


def test_bad_uri_ends_the_start_with_a_sentence() -> None:
    for uri, reason in (
        ("ftp://host/zoo", "is not the URI of a store"),
        ("s3://key:secret@bucket/zoo", "has credentials in it"),
        ("s3://bucket/../zoo", "in its path"),
    ):
        result = run_service(FOVEA_MODELS=uri)
        assert (result.returncode, result.stdout) == (2, "")
        assert reason in result.stderr
        assert "secret" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_commands_do_not_change_the_copy(bucket: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FOVEA_MODELS": f"file://{bucket}", "FOVEA_MODEL_CACHE": str(tmp_path)}
    for arguments in (["publish", str(bucket / "pets" / "1" / "model.onnx")], ["remove", "pets/1"]):
        command = [sys.executable, "-m", "fovea", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "this command changes folders only" in result.stderr


@pytest.mark.long
def test_one_model_in_a_store_and_the_option_of_the_command(bucket: Path, tmp_path: Path) -> None:
    with serve_store(f"file://{bucket}/pets", tmp_path, FOVEA_MODEL_NAME="cats") as server:
        assert server.client.get("/v1/models").json()["models"][0]["name"] == "cats"
    command = [sys.executable, "-m", "fovea", "serve", f"file://{bucket}/pets/1", "--workers", "2"]
    environment = {**os.environ, "FOVEA_MODEL_CACHE": str(tmp_path / "cache"), "FOVEA_PORT": "0"}
    with Server({"args": command, "env": {**environment, "FOVEA_DRAIN_GRACE": "0"}}) as server:
        assert (read_version(server), classify(server)) == ("1", 200)


@pytest.mark.long
def test_signal_looks_at_the_store_that_is_not_watched(bucket: Path, tmp_path: Path) -> None:
    with Server(
        FOVEA_MODELS=f"file://{bucket}",
        FOVEA_MODEL_CACHE=str(tmp_path / "cache"),
        FOVEA_STORE_POLL="0",
        FOVEA_WATCH="0",
    ) as server:
        add_version(bucket, "2", tmp_path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: read_version(server) == "2")


# --- S3 --------------------------------------------------------------------------------------------


class S3:
    """An S3 server: s3rver, which keeps its files, or moto, which forgets them when it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "S3RVER",
            "AWS_SECRET_ACCESS_KEY": "S3RVER",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        if s3rver := find_tool("s3rver"):
            command = [s3rver, "--directory", str(self.folder), "--port", str(self.port), "--silent"]
        else:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def is_listening() -> bool:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                return False
            return True

        wait_until(is_listening)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, action: Callable[[Any], Any]) -> None:
        """Do something with a client, in this process."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="S3RVER",
            aws_secret_access_key="S3RVER",  # noqa: S106 - the server in the tests
            region_name="us-east-1",
        )
        action(client)
        client.close()

    def upload(self, repository: Path) -> None:
        def put(client: Any) -> None:
            errors = client.exceptions
            with suppress(errors.BucketAlreadyExists, errors.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="models")
            for path in sorted(repository.rglob("*")):
                if path.is_file():
                    key = f"zoo/{path.relative_to(repository)}"
                    client.put_object(Bucket="models", Key=key, Body=path.read_bytes())

        self.call(put)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    server = S3(tmp_path / "s3")
    server.start()
    yield server
    server.kill()


@needs_s3
@pytest.mark.long
def test_bucket_is_served_through_the_death_of_its_server(s3: S3, bucket: Path, tmp_path: Path) -> None:
    s3.upload(bucket)
    with serve_store("s3://models/zoo", tmp_path, **s3.environment) as server:
        assert (read_version(server), classify(server)) == ("1", 200)
        add_version(bucket, "2", tmp_path)
        s3.upload(bucket)
        wait_until(lambda: read_version(server) == "2")
        s3.kill()
        wait_until(lambda: count_updates(server, "failed") >= 1)
        assert (read_version(server), classify(server)) == ("2", 200)
        assert server.client.get("/health/ready").status_code == 200
        s3.start()
        add_version(bucket, "3", tmp_path)
        s3.upload(bucket)
        wait_until(lambda: read_version(server) == "3")
        s3.call(lambda client: client.delete_object(Bucket="models", Key="zoo/pets/3/model.onnx"))
        wait_until(lambda: read_version(server) == "2")
    s3.kill()
    with serve_store("s3://models/zoo", tmp_path, **s3.environment) as server:
        assert (read_version(server), classify(server)) == ("2", 200)


@needs_s3
@pytest.mark.long
def test_bad_buckets_end_the_start_with_a_sentence(s3: S3, tmp_path: Path) -> None:
    cache = {"FOVEA_MODEL_CACHE": str(tmp_path / "cache"), "FOVEA_LOG_LEVEL": "error"}
    result = run_service(FOVEA_MODELS="s3://nowhere/zoo", **cache, **s3.environment)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert "there is no s3://nowhere/zoo" in result.stderr
    nobody = {**s3.environment, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    nobody["AWS_EC2_METADATA_DISABLED"] = "true"
    result = run_service(FOVEA_MODELS="s3://nowhere/zoo", **cache, **nobody)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert "credentials" in result.stderr
