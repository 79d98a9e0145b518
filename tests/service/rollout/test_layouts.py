"""Services of the looser layouts, as platforms mount models: one file, and the versions of one model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fovea.service.artifact.repository import find_versions, list_model_names
from fovea.service.errors import ModelError, SettingsError
from fovea.service.rollout.publish import publish_model
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server, wait_until


def read_versions(server: Server) -> list[tuple[str, str]]:
    return [(one["name"], one["version"]) for one in server.client.get("/v1/models").json()["models"]]


@pytest.mark.long
def test_file_in_the_root_is_served_under_the_given_name(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path, "contract", "7")
    mount = tmp_path / "contract" / "7"
    with Server(FOVEA_MODELS=str(mount), FOVEA_MODEL_NAME="pets") as server:
        assert read_versions(server) == [("pets", "7")]
        assert server.client.post("/v1/models/pets/classify", content=make_jpeg()).status_code == 200
        assert server.client.get("/v2/models/pets/ready").status_code == 200
    with Server(FOVEA_MODELS=str(mount)) as server:
        assert read_versions(server) == [("contract", "7")]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_versions_of_one_model_are_swapped_and_rolled_back(tmp_path: Path, workers: str) -> None:
    add_to_repository(build_model(), tmp_path, "mount", "1")
    add_to_repository(build_model(seed=1), tmp_path, "later", "2")
    mount = tmp_path / "mount"
    with Server(
        FOVEA_MODELS=str(mount),
        FOVEA_MODEL_NAME="pets",
        FOVEA_WATCH="0.2",
        FOVEA_WORKERS=workers,
        FOVEA_MANAGEMENT="true",
    ) as server:
        assert read_versions(server) == [("pets", "1")]
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        (tmp_path / "later" / "2").rename(mount / "2")
        wait_until(lambda: read_versions(server) == [("pets", "2")])
        index = server.client.post("/v2/repository/index").json()
        assert {one["name"] for one in index} == {"pets"}
        shutil.rmtree(mount / "2")
        wait_until(lambda: read_versions(server) == [("pets", "1")])


def test_bad_model_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEA_MODELS", str(tmp_path))
    monkeypatch.setenv("FOVEA_MODEL_NAME", "../pets")
    with pytest.raises(SettingsError, match=r"FOVEA_MODEL_NAME is '\.\./pets': use letters"):
        load_settings()


def test_stray_file_hides_no_repository(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path / "zoo", "pets", "1")
    add_to_repository(build_model(), tmp_path, "stray", "1")
    shutil.copytree(tmp_path / "stray" / "1", tmp_path / "zoo" / "1")
    shutil.copy(tmp_path / "stray" / "1" / "model.onnx", tmp_path / "zoo")
    assert load_settings(models=tmp_path / "zoo").models == tmp_path / "zoo"
    assert "pets" in list_model_names(tmp_path / "zoo")
    assert [one.version for one in find_versions(tmp_path / "zoo", "pets")] == ["1"]


def test_other_model_is_not_published_as_a_version(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path, "mount", "1")
    file = tmp_path / "mount" / "1" / "model.onnx"
    name = list_model_names(tmp_path / "mount")[0]
    with pytest.raises(ModelError, match="has the versions of one model"):
        publish_model(file, tmp_path / "mount", "dogs")
    assert publish_model(file, tmp_path / "mount", name).parent.name == "2"
    assert publish_model(file, tmp_path / "mount", "dogs", single_name="dogs").parent.name == "3"
