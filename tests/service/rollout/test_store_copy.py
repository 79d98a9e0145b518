"""The local copy of a repository in a store, by fsspec's own file systems."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from fovea.service.atomic_files import StagedFile, WriteError
from fovea.service.errors import StartError
from fovea.service.remote.store import Store, StoredFile, open_store
from fovea.service.remote.store_uri import StoreError, find_copy_folder
from fovea.service.rollout import store_copy
from fovea.service.rollout.store_copy import StoreCopy, create_private_folder, read_index
from fovea.service.rollout.store_sync import fetch_models
from fovea.service.settings import load_settings
from tests.servers import ROOT

URI = "memory://bucket/zoo"


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    for path in ("pets/1/model.onnx", "pets/2/model.onnx", "pets/config.toml", "default"):
        file_system.pipe(f"/bucket/zoo/{path}", path.encode())
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def update(folder: Path) -> tuple[list[str], list[str]]:
    report = StoreCopy(open_store(URI), folder).update()
    return report.copied, report.removed


def list_files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )


def test_copy_has_the_repository_and_nothing_else(memory: Any, folder: Path) -> None:
    memory.pipe("/bucket/zoo/README.md", b"text")
    memory.pipe("/bucket/zoo/pets/1/trial.json", b"a verdict of somebody else")
    memory.pipe("/bucket/zoo/pets/x/model.onnx", b"no version")
    memory.pipe("/bucket/zoo/.hidden/1/model.onnx", b"hidden")
    assert update(folder)[0] == ["pets/1/model.onnx", "pets/2/model.onnx", "default", "pets/config.toml"]
    assert list_files(folder) == ["default", "pets/1/model.onnx", "pets/2/model.onnx", "pets/config.toml"]
    assert (folder / "pets/1/model.onnx").read_bytes() == b"pets/1/model.onnx"
    assert update(folder) == ([], [])


def test_change_in_the_store_or_in_the_copy_is_copied_again(memory: Any, folder: Path) -> None:
    update(folder)
    memory.pipe("/bucket/zoo/pets/2/model.onnx", b"PETS/2/MODEL.ONNX")  # of the same size
    assert update(folder) == (["pets/2/model.onnx"], [])
    (folder / "pets/1/model.onnx").write_bytes(b"damaged, and long")
    (folder / "default").unlink()
    assert update(folder) == (["pets/1/model.onnx", "default"], [])
    (folder / ".fovea-store.json").write_text("[]")  # a broken index costs a copy
    assert len(update(folder)[0]) == 4
    assert (folder / "pets/1/model.onnx").read_bytes() == b"pets/1/model.onnx"


def test_deleted_version_is_removed_with_its_verdict(memory: Any, folder: Path) -> None:
    update(folder)
    (folder / "pets/2/trial.json").write_text("{}")
    (folder / "pets/1/own.txt").write_text("not ours")
    memory.rm("/bucket/zoo/pets/2/model.onnx")
    memory.rm("/bucket/zoo/default")
    assert update(folder) == ([], ["default", "pets/2/model.onnx"])
    assert list_files(folder) == ["pets/1/model.onnx", "pets/1/own.txt", "pets/config.toml"]
    assert not (folder / "pets/2").exists()


def test_empty_or_missing_store_removes_nothing(memory: Any, folder: Path) -> None:
    update(folder)
    for path in ("pets/1/model.onnx", "pets/2/model.onnx"):
        memory.rm(f"/bucket/zoo/{path}")
    with pytest.raises(StoreError, match="the copy stays as it is"):
        update(folder)
    memory.store.clear()
    with pytest.raises(StoreError, match="there is no memory://bucket/zoo"):
        update(folder)
    assert len(list_files(folder)) == 4


def test_names_that_lead_out_are_never_written(memory: Any, folder: Path, tmp_path: Path) -> None:
    for path in ("../1/model.onnx", "pets/../../2/model.onnx", "..\\3/model.onnx", "%2e%2e/4/model.onnx"):
        memory.store[f"/bucket/zoo/{path}"] = memory.store["/bucket/zoo/default"]
    update(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert len(list_files(folder)) == 4


def test_link_in_the_copy_is_replaced_and_not_followed(memory: Any, folder: Path, tmp_path: Path) -> None:
    update(folder)
    (tmp_path / "target").write_text("kept")
    (folder / "default").unlink()
    (folder / "default").symlink_to(tmp_path / "target")
    update(folder)
    assert (tmp_path / "target").read_text() == "kept"
    assert not (folder / "default").is_symlink()


def test_failure_in_the_middle_leaves_the_old_file_and_spares_the_others(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder)
    before = read_index(folder).updated
    memory.pipe("/bucket/zoo/pets/1/model.onnx", b"new content of 1")
    memory.pipe("/bucket/zoo/pets/3/model.onnx", b"new version")
    original = Store.copy_file

    def break_first(self: Store, stored: StoredFile, target: BinaryIO) -> None:
        if stored.path == "pets/1/model.onnx":
            target.write(b"new con")
            raise StoreError("the connection is lost")
        original(self, stored, target)

    monkeypatch.setattr(Store, "copy_file", break_first)
    with pytest.raises(StoreError, match="connection is lost"):
        update(folder)
    assert (folder / "pets/1/model.onnx").read_bytes() == b"pets/1/model.onnx"
    assert (folder / "pets/3/model.onnx").read_bytes() == b"new version"
    assert not list(folder.rglob("*.tmp"))
    assert read_index(folder).updated == before
    monkeypatch.undo()
    assert update(folder) == (["pets/1/model.onnx"], [])


def test_version_and_its_configuration_appear_together(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a version would be tried under the settings of its predecessor."""
    memory.pipe("/bucket/zoo/birds/1/model.onnx", b"another model")
    update(folder)
    memory.pipe("/bucket/zoo/pets/3/model.onnx", b"new version")
    memory.pipe("/bucket/zoo/pets/4/model.onnx", b"newer version")
    memory.pipe("/bucket/zoo/pets/config.toml", b"new settings")
    memory.pipe("/bucket/zoo/birds/2/model.onnx", b"new version of the other model")
    original = Store.copy_file
    copied = []

    def look(self: Store, stored: StoredFile, target: BinaryIO) -> None:
        original(self, stored, target)
        copied.append(stored.path)
        is_complete = len([path for path in copied if path.startswith("pets/")]) == 3
        if stored.path.startswith("pets/"):  # not even the last of them appears before it is published
            assert not (folder / "pets/3/model.onnx").exists()
            assert not (folder / "pets/4/model.onnx").exists()
            assert (folder / "pets/config.toml").read_bytes() == b"pets/config.toml"
        elif is_complete:
            assert (folder / "pets/config.toml").read_bytes() == b"new settings"

    names = []
    publish = StagedFile.publish

    def record(self: StagedFile) -> None:
        names.append(str(self.path.relative_to(folder)))
        publish(self)

    monkeypatch.setattr(Store, "copy_file", look)
    monkeypatch.setattr(StagedFile, "publish", record)
    update(folder)
    assert (folder / "pets/4/model.onnx").read_bytes() == b"newer version"
    assert (folder / "birds/2/model.onnx").exists()
    pets = [name for name in names if name.startswith("pets/")]
    assert pets == ["pets/config.toml", "pets/3/model.onnx", "pets/4/model.onnx"]


def test_version_waits_for_a_configuration_that_cannot_be_read(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder)
    memory.pipe("/bucket/zoo/pets/3/model.onnx", b"new version")
    memory.pipe("/bucket/zoo/pets/config.toml", b"new settings")
    memory.pipe("/bucket/zoo/birds/1/model.onnx", b"another model")
    original = Store.copy_file

    def fail(self: Store, stored: StoredFile, target: BinaryIO) -> None:
        if stored.path == "pets/config.toml":
            raise StoreError("access denied")
        original(self, stored, target)

    monkeypatch.setattr(Store, "copy_file", fail)
    with pytest.raises(StoreError, match="access denied"):
        update(folder)
    assert list_files(folder) == [
        "birds/1/model.onnx", "default", "pets/1/model.onnx", "pets/2/model.onnx", "pets/config.toml"
    ]  # fmt: skip
    assert not (folder / "pets/3").exists()
    monkeypatch.undo()
    assert sorted(update(folder)[0]) == ["pets/3/model.onnx", "pets/config.toml"]


KILLED_COPY = """
import os, signal, sys
from pathlib import Path
from fovea.service.remote.store import Store, open_store
from fovea.service.rollout.store_copy import StoreCopy
def copy_file(self, stored, target):
    target.write(b"half")
    target.flush()
    os.kill(os.getpid(), signal.SIGKILL)
Store.copy_file = copy_file
StoreCopy(open_store(sys.argv[1]), Path(sys.argv[2])).update()
"""


def test_half_files_of_a_killed_copy_are_removed_by_the_next(tmp_path: Path, folder: Path) -> None:
    """Also of a version that is gone from the store meanwhile."""
    zoo = tmp_path / "zoo"
    for name in ("pets/1", "pets/2"):
        (zoo / name).mkdir(parents=True)
        (zoo / name / "model.onnx").write_bytes(b"model")
    uri = f"file://{zoo}"
    process = subprocess.run([sys.executable, "-c", KILLED_COPY, uri, folder], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    (left,) = folder.rglob("*.tmp")
    assert left.parent == folder / "pets" / "1"
    (folder / "pets" / ".notes.tmp").touch()  # no file of a copy
    (zoo / "pets/1/model.onnx").unlink()
    StoreCopy(open_store(uri), folder).update()
    assert not left.parent.exists()
    assert list_files(folder) == ["pets/2/model.onnx"]
    assert (folder / "pets" / ".notes.tmp").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), WriteError("No space left")])
def test_full_disk_is_one_sentence_and_harms_nothing(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    update(folder)
    memory.pipe("/bucket/zoo/pets/3/model.onnx", b"new version")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Store, "copy_file", fail)
    with pytest.raises(StoreError, match="No space left"):
        update(folder)
    assert len(list_files(folder)) == 4


def test_object_that_changes_during_the_copy_is_not_used(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder)
    memory.pipe("/bucket/zoo/pets/3/model.onnx", b"first half, second half")
    original = Store.open_file

    def change(self: Store, path: str) -> BinaryIO:
        file = original(self, path)
        time.sleep(0.001)
        memory.pipe(f"/bucket/zoo/{path}", b"FIRST HALF, SECOND HALF")
        return file

    monkeypatch.setattr(Store, "open_file", change)
    with pytest.raises(StoreError, match="changed while it was read"):
        update(folder)
    assert not (folder / "pets/3/model.onnx").exists()


def test_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy").chmod(0o777)
    with pytest.raises(StoreError, match="set FOVEA_MODEL_CACHE"):
        create_private_folder(tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="is a link"):
        create_private_folder(tmp_path / "link")
    create_private_folder(tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").stat().st_mode & 0o077 == 0


def test_folder_of_the_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = (find_copy_folder(f"s3://bucket/{name}", tmp_path) for name in ("zoo", "zoo2"))
    assert first.parent == tmp_path
    assert first != second
    assert first.name.startswith("s3-bucket-zoo-")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_copy_folder("s3://bucket/zoo", None) == tmp_path / "cache" / "fovea" / "models" / first.name
    monkeypatch.setattr(os, "access", lambda *_: False)  # as in a container that is read-only
    assert str(os.geteuid()) in find_copy_folder("s3://bucket/zoo", None).name


def test_layout_is_that_of_repositories() -> None:
    for path in ("a/1/model.onnx", "1/model.onnx", "model.onnx", "config.toml", "a/config.toml", "default"):
        assert store_copy._LAYOUT.fullmatch(path), path
    for path in ("a/b/model.onnx", "a/1/2/model.onnx", "a/١/model.onnx", "-a/1/model.onnx", "a/default"):
        assert not store_copy._LAYOUT.fullmatch(path), path


def test_folder_that_cannot_be_listed_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cats", "pets"):
        (tmp_path / "store" / name / "1").mkdir(parents=True)
        (tmp_path / "store" / name / "1" / "model.onnx").write_bytes(b"model")
    store = open_store(f"file://{tmp_path}/store")
    StoreCopy(store, tmp_path / "copy").update()
    file_system = type(store._file_system)
    list_folder = file_system.ls

    def fail(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("pets"):
            raise OSError(5, "Input/output error", path)
        return list_folder(self, path, *arguments, **options)

    monkeypatch.setattr(file_system, "ls", fail)
    with pytest.raises(StoreError, match="cannot read"):
        StoreCopy(store, tmp_path / "copy").update()
    assert list_files(tmp_path / "copy") == ["cats/1/model.onnx", "pets/1/model.onnx"]


def test_file_that_is_there_but_not_listed_is_kept(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder)
    list_all = Store.list_files
    monkeypatch.setattr(
        Store, "list_files", lambda self: [one for one in list_all(self) if "2" not in one.path]
    )
    with pytest.raises(StoreError, match=r"did not list pets/2/model\.onnx"):
        update(folder)
    assert (folder / "pets/2/model.onnx").exists()


def test_unreadable_file_does_not_keep_others_from_being_removed(
    memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder)
    memory.rm("/bucket/zoo/pets/2/model.onnx")
    memory.pipe("/bucket/zoo/dogs/1/model.onnx", b"locked")
    copy_file = Store.copy_file

    def refuse(self: Store, stored: StoredFile, target: Any) -> None:
        if stored.path.startswith("dogs"):
            raise StoreError("denied")
        copy_file(self, stored, target)

    monkeypatch.setattr(Store, "copy_file", refuse)
    with pytest.raises(StoreError, match="denied"):
        update(folder)
    assert not (folder / "pets/2").exists()
    assert not (folder / "dogs").exists()


def test_start_refuses_a_folder_of_others_and_half_a_copy(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/missing"
    settings = load_settings(models=uri, model_cache=tmp_path / "cache")
    folder = find_copy_folder(uri, tmp_path / "cache")
    create_private_folder(folder)
    (folder / "pets" / "1").mkdir(parents=True)
    (folder / "pets" / "1" / "model.onnx").write_bytes(b"half of a repository")
    with pytest.raises(StartError, match="no copy of an earlier start"):
        fetch_models(settings)
    folder.chmod(0o777)
    with pytest.raises(StartError, match="others may write to it"):
        fetch_models(settings)


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def fail(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    assert str(os.geteuid()) in find_copy_folder("s3://bucket/zoo", None).name
