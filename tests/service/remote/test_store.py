"""Stores, by the file systems that fsspec itself has: a folder, and memory."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fovea.service.errors import BodyTooLarge
from fovea.service.remote import store as store_module
from fovea.service.remote.store import Store, StoredFile, open_store
from fovea.service.remote.store_uri import (
    StoreError,
    StoreFileNotFound,
    check_store_uri,
    has_scheme,
    is_safe_path,
)
from fovea.service.remote.time_limits import LimitedFileSystem, _LimitedFile
from tests.servers import ROOT


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


@pytest.fixture
def zoo(memory: Any) -> Store:
    for path in (
        "pets/1/model.onnx",
        "pets/2/model.onnx",
        "pets/config.toml",
        "birds/7/model.onnx",
        "default",
    ):
        memory.pipe(f"/bucket/zoo/{path}", path.encode())
    memory.pipe("/bucket/zoology/1.txt", b"another folder whose name begins alike")
    return open_store("memory://bucket/zoo/")


ZOO = ["birds/7/model.onnx", "default", "pets/1/model.onnx", "pets/2/model.onnx", "pets/config.toml"]


def test_files_are_listed_by_path_below_the_root(zoo: Store) -> None:
    files = zoo.list_files()
    assert [one.path for one in files] == ZOO
    assert {one.path: one.size for one in files} == {path: len(path) for path in ZOO}
    assert zoo.uri == "memory://bucket/zoo"


def test_walk_yields_the_same_files_in_a_stable_order(zoo: Store) -> None:
    walked = [one.path for one in zoo.walk_files()]
    assert sorted(walked) == ZOO
    assert walked == [one.path for one in zoo.walk_files()]
    assert walked[0] == "default"


def test_folder_of_this_machine_is_a_store_too(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.jpg").write_bytes(b"content")
    (tmp_path / "a" / "d.jpg").write_bytes(b"")
    store = open_store(f"file://{tmp_path}")
    assert [one.path for one in store.list_files()] == ["a/b/c.jpg", "a/d.jpg"]
    assert store.read_file("a/b/c.jpg", 7) == b"content"
    with pytest.raises(BodyTooLarge, match="more than 6 bytes"):
        store.read_file("a/b/c.jpg", 6)
    with store.open_file("a/b/c.jpg") as file:  # archives need to seek
        file.seek(-3, io.SEEK_END)
        assert file.read() == b"ent"


def test_single_file_is_a_store_with_one_file(zoo: Store) -> None:
    store = open_store("memory://bucket/zoo/pets/1/model.onnx")
    assert [one.path for one in store.walk_files()] == [""]
    assert store.read_file("", 100) == b"pets/1/model.onnx"


def test_missing_bucket_folder_and_file_are_not_found(zoo: Store) -> None:
    for call in (
        lambda: open_store("memory://nowhere/zoo").list_files(),
        lambda: list(open_store("memory://nowhere/zoo").walk_files()),
        lambda: zoo.describe_file("pets/9/model.onnx"),
        lambda: zoo.describe_file("pets"),
        lambda: zoo.read_file("pets/9/model.onnx", 10),
    ):
        with pytest.raises(StoreFileNotFound, match="there is no memory://"):
            call()


def test_limit_of_files(zoo: Store) -> None:
    with pytest.raises(StoreError, match="more than 4 files"):
        zoo.list_files(4)


def test_names_that_lead_out_are_skipped_and_never_opened(
    memory: Any, zoo: Store, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ["../../etc/passwd", "pets/../../x", "a//b", "./a", "a\\..\\b", "a\nb", "%2e%2e/x"]
    for path in bad:
        memory.store[f"/bucket/zoo/{path}"] = memory.store["/bucket/zoo/default"]
        assert not is_safe_path(path)
        with pytest.raises(StoreError, match="is not a path below"):
            zoo.open_file(path)
    listed = [
        {"name": f"/bucket/zoo/{path}", "size": 1, "type": "file"} for path in [*bad, "good", "../zoology/1"]
    ]
    listed.append({"name": "/bucket/zoology/1.txt", "size": 1, "type": "file"})
    assert [one.path for one in zoo._describe_files(listed)] == ["good"]
    assert len(caplog.messages) == len(bad) + 2


def test_copy_checks_size_digest_and_change(memory: Any, zoo: Store) -> None:
    stored = zoo.describe_file("default")
    target = io.BytesIO()
    zoo.copy_file(stored, target)
    assert target.getvalue() == b"default"

    right, wrong = (hashlib.sha256(text).hexdigest() for text in (b"default", b"other"))
    zoo.copy_file(StoredFile(stored.path, stored.size, stored.marker, f"sha256:{right}"), io.BytesIO())
    with pytest.raises(StoreError, match=r"sha256 .* has another"):
        zoo.copy_file(StoredFile(stored.path, stored.size, stored.marker, f"sha256:{wrong}"), io.BytesIO())
    for size in (stored.size - 1, stored.size + 1):
        with pytest.raises(StoreError, match="changed while it was read"):
            zoo.copy_file(StoredFile(stored.path, size, stored.marker), io.BytesIO())

    class Replacing(io.BytesIO):
        def write(self, chunk: Any) -> int:
            time.sleep(0.001)
            memory.pipe("/bucket/zoo/default", b"DEFAULT")  # as long as before
            return super().write(chunk)

    with pytest.raises(StoreError, match="changed while it was read"):
        zoo.copy_file(stored, Replacing())


def test_failure_of_the_target_is_no_failure_of_the_store(zoo: Store) -> None:
    class Full(io.BytesIO):
        def write(self, chunk: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        zoo.copy_file(zoo.describe_file("default"), Full())


@pytest.mark.parametrize(
    ("info", "digest"),
    [
        ({"md5Hash": "XUFAKrxLKna5cZ2REBfFkg=="}, "md5:5d41402abc4b2a76b9719d911017c592"),  # gcsfs
        ({"content_settings": {"content_md5": bytearray(16)}}, f"md5:{'0' * 32}"),  # adlfs
        ({"lfs": {"sha256": "AB" * 32}}, f"sha256:{'ab' * 32}"),  # huggingface_hub
        ({"ETag": '"5d41402abc4b2a76b9719d911017c592"'}, None),
        ({"md5Hash": "no base64"}, None),
        ({}, None),
    ],
)
def test_digest_of_each_store(info: dict[str, Any], digest: str | None) -> None:
    assert store_module._read_digest(info) == digest


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3:///zoo", "names no bucket"),
        ("s3://", "names no bucket"),
        ("ftp://host/zoo", "Fovea knows s3://"),
        ("oci://registry/zoo:1", "Fovea knows s3://"),
        ("zoo", "Fovea knows s3://"),
        ("s3://key:secret@bucket/zoo", "credentials"),
        ("s3://bucket/zoo?versionId=1", "query"),
        ("s3://bucket/../zoo", "'..'"),
        ("s3://bucket//zoo", "an empty name"),
        ("s3://[bucket/zoo", "not a URI"),
    ],
)
def test_bad_uri_is_one_sentence(uri: str, reason: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(uri)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)


def test_scheme_is_known_by_its_form() -> None:
    assert check_store_uri("S3://bucket/zoo/") == "s3://bucket/zoo"
    assert has_scheme("s3://bucket")
    assert not any(map(has_scheme, ["zoo", "/zoo", "C:\\zoo", "c://zoo", "./s3://bucket"]))


def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install fsspec gcsfs"):
        open_store("gs://bucket/zoo")


def test_failures_of_packages_are_sentences() -> None:
    class NoCredentialsError(Exception):
        pass

    store = Store("s3://bucket/zoo", None, "bucket/zoo")
    for error, reason in (
        (NoCredentialsError("Unable to locate credentials"), "no valid credentials"),
        (PermissionError("Access Denied"), "denies access"),
        (TimeoutError(), "did not answer in time"),
        (FileNotFoundError("The specified bucket does not exist"), "there is no s3://bucket/zoo"),
        (ValueError("a\nb"), "a b"),
        (ValueError(), "ValueError"),
    ):
        with pytest.raises(StoreError, match=reason), store.translate_errors():
            raise error
    with pytest.raises(KeyboardInterrupt), store.translate_errors():
        raise KeyboardInterrupt


def test_fsspec_is_imported_for_a_store_only() -> None:
    code = "import sys, fovea.service.remote.store as _; sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- time limits ---------------------------------------------------------------------------------


def test_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes connections and says nothing, as behind a lost route."""
    constants = pytest.importorskip("huggingface_hub.constants")
    limits = store_module._CALL_SECONDS
    assert limits["hf"] < 300
    monkeypatch.setattr(store_module, "_CALL_SECONDS", {**limits, "hf": 0.3})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = open_store("hf://owner/zoo")
        for call in (store.list_files, lambda: store.describe_file("model.onnx")):
            with pytest.raises(StoreError, match=r"^the store did not answer in time about hf://owner/zoo"):
                call()


def test_file_that_stalls_is_given_up(tmp_path: Path) -> None:
    """A FIFO stalls as a connection does: nobody opens its other end, or nobody writes into it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    limited = LimitedFileSystem(fsspec.filesystem("file"), 0.3)
    with pytest.raises(TimeoutError):
        limited.open(str(fifo))
    writer = os.open(fifo, os.O_RDWR)  # the call above goes on, and ends now
    try:
        with io.BufferedReader(_LimitedFile(fifo.open("rb", buffering=0), 0.3)) as file:
            os.write(writer, b"abc")
            assert file.read(3) == b"abc"
            with pytest.raises(TimeoutError):
                file.read(1)
    finally:
        os.write(writer, b"d")  # ends the read that was given up
        os.close(writer)


def test_limited_file_system_reads_as_without_limits(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.onnx").write_bytes(content)
    plain = fsspec.filesystem("file")
    limited = LimitedFileSystem(plain, 30)
    store = Store("file://x", limited, str(tmp_path))
    assert [one.path for one in store.list_files()] == ["a/model.onnx"]
    assert [one.path for one in store.walk_files()] == ["a/model.onnx"]
    assert store.read_file("a/model.onnx", 1 << 20) == content
    with store.open_file("a/model.onnx") as file:
        file.seek(-10, io.SEEK_END)
        assert file.tell() == len(content) - 10
        assert file.read() == content[-10:]
        file.seek(5)
        assert file.read(7) == content[5:12]
    with pytest.raises(StoreFileNotFound):
        store.describe_file("b")
