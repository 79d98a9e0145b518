"""Model versions that a repository on disk asks the service to serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.removed_version import find_removable
from fovea.service.artifact.repository import (
    ModelVersion,
    ServingState,
    find_versions,
    record_default_model,
    scan_repository,
)
from fovea.service.errors import ModelError
from fovea.service.rollout.publish import publish_model
from tests.graphs import add_to_repository, build_model


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for version in ("1", "2", "10"):
        _write_model(tmp_path / "pets" / version)
    return tmp_path


def _write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")


def _list_versions(versions: tuple[ModelVersion, ...]) -> list[str | None]:
    return [model.version for model in versions]


def test_highest_version_number_is_served(zoo: Path) -> None:
    assert _list_versions(scan_repository(zoo).versions_by_model["pets"]) == ["10"]


def test_config_can_select_several_versions(zoo: Path) -> None:
    (zoo / "pets" / "config.toml").write_text('versions = ["10", "2"]\nbatch_max = 3\n')
    versions = scan_repository(zoo).versions_by_model["pets"]
    assert _list_versions(versions) == ["2", "10"]
    assert {version.config.batch_max for version in versions} == {3}


def test_requested_version_overrides_config(zoo: Path) -> None:
    (zoo / "pets" / "config.toml").write_text('versions = ["10"]\n')
    assert _list_versions(find_versions(zoo, "pets", "1")) == ["1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            'versions = ["3"]',
            "config.toml asks for version 3 of pets, which does not exist; there are 1, 2, 10",
        ),
        ('versions = ["x"]', "version x of pets, which does not exist"),
        ("versions = []", "config.toml: versions: it must have 1 or more entries"),
        ("batch_max = 0", "config.toml: batch_max: it must be at least 1"),
        ('batch_max = "4"', "config.toml: batch_max: it must be an integer"),
        ("batch_size = 4", "config.toml: batch_size: unknown name"),
        (
            'provider = "gpu"',
            "config.toml: provider: it must be 'auto', 'cpu', 'cuda', 'openvino' or 'tensorrt'",
        ),
        ("threads = ", "config.toml is not TOML"),
        ("\xff", "config.toml is not TOML"),
    ],
)
def test_bad_config_is_reported_with_its_reason(zoo: Path, config: str, message: str) -> None:
    (zoo / "pets" / "config.toml").write_bytes(config.encode("latin-1"))
    with pytest.raises(ModelError) as error:
        scan_repository(zoo)
    assert message in str(error.value)


def test_other_files_and_folders_are_ignored(zoo: Path) -> None:
    (zoo / "pets" / "11").mkdir()
    (zoo / "pets" / ".12").mkdir()
    (zoo / "pets" / "latest").mkdir()
    (zoo / "notes.txt").touch()
    _write_model(zoo / ".hidden" / "1")
    (zoo / "empty").mkdir()
    versions_by_model = scan_repository(zoo).versions_by_model
    assert list(versions_by_model) == ["pets"]
    assert _list_versions(versions_by_model["pets"]) == ["10"]


def test_file_is_a_repository_of_one_model(zoo: Path) -> None:
    path = zoo / "pets" / "2" / "model.onnx"
    assert scan_repository(path) == ServingState({None: (ModelVersion.from_path(path, None, None),)}, None)


def test_changed_file_has_another_fingerprint(zoo: Path) -> None:
    path = zoo / "pets" / "10" / "model.onnx"
    first = fingerprint_of(path)
    assert fingerprint_of(path) == first
    os.utime(path, ns=(1, 1))
    second = fingerprint_of(path)
    path.write_bytes(b"longer than before")
    os.utime(path, ns=(1, 1))
    third = fingerprint_of(path)
    replacement = path.with_name("fresh")
    replacement.write_bytes(path.read_bytes())
    os.utime(replacement, ns=(1, 1))
    replacement.replace(path)
    assert len({first, second, third, fingerprint_of(path)}) == 4


@pytest.mark.parametrize("path", ["nowhere", "pets/1"])
def test_invalid_repository_is_reported(zoo: Path, path: str) -> None:
    with pytest.raises(ModelError, match=r"cannot read the repository|has no <name>/<version>/model.onnx"):
        scan_repository(zoo / path)


# --- default model -------------------------------------------------------------------------------


def test_default_is_the_only_or_the_named_model(zoo: Path) -> None:
    assert scan_repository(zoo).default_model == "pets"
    _write_model(zoo / "birds" / "1")
    assert scan_repository(zoo).default_model is None
    (zoo / "default").write_text(" birds\n")
    assert scan_repository(zoo).default_model == "birds"
    assert scan_repository(zoo, "pets").default_model == "pets"
    (zoo / "default").write_text("\n")
    assert scan_repository(zoo).default_model is None


@pytest.mark.parametrize(
    ("content", "reason"), [(b"fish", "is 'fish'; there are pets"), (b"\xff", "cannot read")]
)
def test_invalid_default_model_is_refused(zoo: Path, content: bytes, reason: str) -> None:
    (zoo / "default").write_bytes(content)
    with pytest.raises(ModelError, match=f"default {reason}|{reason} .*default"):
        scan_repository(zoo)


def test_only_a_single_model_is_recorded_as_default(zoo: Path) -> None:
    record_default_model(zoo / "nowhere")
    record_default_model(zoo)
    assert (zoo / "default").read_text() == "pets\n"
    _write_model(zoo / "birds" / "1")
    (zoo / "default").write_text("birds\n")
    record_default_model(zoo)
    assert (zoo / "default").read_text() == "birds\n"
    (zoo / "default").unlink()
    record_default_model(zoo)  # with two models, neither is chosen
    assert not (zoo / "default").exists()


@pytest.fixture
def versions_of_one(tmp_path: Path) -> Path:
    """A folder as KServe and SageMaker mount it: versions without a folder for the name."""
    add_to_repository(build_model(), tmp_path, "mount", "1")
    add_to_repository(build_model(seed=1), tmp_path, "mount", "10")
    return tmp_path / "mount"


def test_versions_of_one_model_need_no_folder_for_the_name(versions_of_one: Path) -> None:
    state = scan_repository(versions_of_one)
    assert {name: _list_versions(versions) for name, versions in state.versions_by_model.items()} == {
        "mount": ["10"]  # the name in the contract
    }
    assert state.default_model == "mount"
    named = scan_repository(versions_of_one, single_name="pets").versions_by_model
    assert [(one.name, one.version) for one in named["pets"]] == [("pets", "10")]
    assert named["pets"][0].path == versions_of_one / "10" / "model.onnx"
    (versions_of_one / "config.toml").write_text('versions = ["1"]\n')
    assert _list_versions(scan_repository(versions_of_one).versions_by_model["mount"]) == ["1"]


def test_new_version_does_not_rename_the_only_model(versions_of_one: Path, tmp_path: Path) -> None:
    add_to_repository(build_model(seed=2), tmp_path, "other", "11")
    (tmp_path / "other" / "11").rename(versions_of_one / "11")
    state = scan_repository(versions_of_one)
    assert {name: _list_versions(one) for name, one in state.versions_by_model.items()} == {"mount": ["11"]}


def test_model_whose_name_is_a_number_is_no_version(tmp_path: Path) -> None:
    _write_model(tmp_path / "1" / "2")
    _write_model(tmp_path / "7" / "1")
    assert sorted(map(str, scan_repository(tmp_path).versions_by_model)) == ["1", "7"]


def test_folder_with_broken_versions_has_the_name_of_the_folder(tmp_path: Path) -> None:
    _write_model(tmp_path / "mount" / "1")
    assert list(scan_repository(tmp_path / "mount").versions_by_model) == ["mount"]


def test_versions_of_one_model_are_not_removed_by_command(versions_of_one: Path) -> None:
    with pytest.raises(ModelError, match="versions of one model"):
        find_removable(versions_of_one, "mount/1", may_be_last=True)


def test_publishing_adds_a_version_to_the_only_model(versions_of_one: Path) -> None:
    source = versions_of_one / "1" / "model.onnx"
    assert publish_model(source, versions_of_one) == versions_of_one / "11" / "model.onnx"
    assert not (versions_of_one / "default").exists()
