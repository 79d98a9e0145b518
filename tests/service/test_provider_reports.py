"""Every place that names the execution provider of a model names the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fovea.service.providers import PROVIDERS, ProviderName
from tests.bench.test_doctor import run_doctor
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server, run_service, wait_until
from tests.tools import needs_openvino, without_openvino
from tests.zoo import classify_pictures, publish_variant

PROVIDER_PARAMETERS = ["cpu", pytest.param("openvino", marks=needs_openvino)]


@pytest.mark.parametrize("provider", PROVIDER_PARAMETERS)
def test_all_reports_name_the_same_provider(small_zoo: Path, provider: ProviderName) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_PROVIDER=provider) as server:
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        runtime = server.client.get("/runtime").json()
        assert runtime["models"][0]["provider"] == provider
        assert PROVIDERS[provider].runtime_name in runtime["providers_available"]
        for name in PROVIDERS:
            count = server.read_metric("fovea_model_info", model="small", provider=name)
            assert count == (name == provider)
        assert server.read_metric("fovea_provider_fallback", model="small") == 0
        (version,) = server.client.get("/v1/models").json()["versions"]
        assert f"labels on {provider}, verified" in version["reason"]
        (model,) = server.client.get("/models/small").json()
        assert {worker["gpu"] for worker in model["workers"]} <= {PROVIDERS[provider].is_gpu}
        assert f"small version 1 on {provider} at" in server.greeting
    assert f"labels on {provider}, verified" in server.log


@pytest.mark.long
@pytest.mark.parametrize("provider", PROVIDER_PARAMETERS)
def test_doctor_names_the_provider(small_zoo: Path, provider: ProviderName) -> None:
    process = run_doctor("--seconds", "1", "--json", FOVEA_MODELS=str(small_zoo), FOVEA_PROVIDER=provider)
    assert process.returncode == 0, process.stderr
    (model,) = json.loads(process.stdout)["runtime"]["models"]
    assert model["provider"] == provider


@pytest.mark.parametrize("provider", ["tensorrt", pytest.param("openvino", marks=without_openvino)])
def test_service_does_not_start_without_the_provider(small_zoo: Path, provider: ProviderName) -> None:
    process = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_PROVIDER=provider)
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("fovea: ")
    assert f"FOVEA_PROVIDER is {provider}, but {PROVIDERS[provider].absence}; " in line
    assert line.endswith(PROVIDERS[provider].remedy)


@pytest.mark.long
@needs_openvino
def test_explanations_of_openvino_models_run(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_PROVIDER="openvino") as server:
        reply = server.client.post("/v1/explain", content=make_jpeg())
        assert reply.status_code == 200, reply.text


@pytest.mark.long
@needs_openvino
def test_new_version_is_tried_and_served_on_openvino(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_PROVIDER="openvino", FOVEA_WATCH="0.1") as server:
        publish_variant(zoo, seed=7)
        wait_until(lambda: classify_pictures(server)["model"]["version"] == "2")
        assert server.read_metric("fovea_model_info", version="2", provider="openvino") == 1
