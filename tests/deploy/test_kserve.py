"""KServe's runtime and sample: valid, consistent, and a service that answers as the runtime promises."""

from __future__ import annotations

import base64
import copy
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fovea.service.grpc import inference_pb2 as pb
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.deploy.conftest import needs_validation
from tests.deploy.manifests import validate_manifest
from tests.servers import DEFAULT_MODEL, ROOT, Server, sum_samples
from tests.service.grpc.channels import create_stub, open_channel

FOLDER = ROOT / "deploy" / "kserve"
RUNTIME: dict[str, Any] = yaml.safe_load((FOLDER / "runtime.yaml").read_text())
GRPC_RUNTIME: dict[str, Any] = yaml.safe_load((FOLDER / "runtime-grpc.yaml").read_text())
SAMPLE: dict[str, Any] = yaml.safe_load((FOLDER / "inferenceservice.yaml").read_text())
(CONTAINER,) = RUNTIME["spec"]["containers"]
ENVIRONMENT = {one["name"]: one["value"] for one in CONTAINER["env"]}
SHIP = (ROOT / "samples" / "ship.jpg").read_bytes()


@needs_validation
@pytest.mark.parametrize(
    "manifest", [RUNTIME, GRPC_RUNTIME, SAMPLE], ids=lambda manifest: str(manifest["metadata"]["name"])
)
def test_manifest_is_valid(manifest: dict[str, Any]) -> None:
    validate_manifest(manifest)


@needs_validation
@pytest.mark.parametrize("field", ["volumeMount", "env"])
def test_wrong_fields_of_the_container_are_refused(field: str) -> None:
    container = {**CONTAINER, field: [{"key": "value"}]}
    manifest = {**RUNTIME, "spec": {**RUNTIME["spec"], "containers": [container]}}
    with pytest.raises(Exception, match=r"volumeMount|'key'"):
        validate_manifest(manifest)


def test_names_agree_and_exist() -> None:
    assert ENVIRONMENT.keys() <= {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    port = int(ENVIRONMENT["FOVEA_PORT"])
    assert [one["containerPort"] for one in CONTAINER["ports"]] == [port] == [8080]
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(port)
    for probe in ("readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"]["port"] == port
    assert CONTAINER["name"] == "kserve-container"
    assert (ENVIRONMENT["FOVEA_MODELS"], ENVIRONMENT["FOVEA_MODEL_NAME"]) == ("/mnt/models", "{{.Name}}")
    model = SAMPLE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    formats = {one["name"]: one["autoSelect"] for one in RUNTIME["spec"]["supportedModelFormats"]}
    assert formats[model["modelFormat"]["name"]] is True
    assert formats["onnx"] is False


def test_image_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CONTAINER["image"] == f"fovea:{version}"


def test_runtime_with_grpc_differs_in_what_grpc_needs() -> None:
    """Another name, image and port, and no format that KServe chooses it for by itself."""
    runtime = copy.deepcopy(GRPC_RUNTIME)
    (container,) = runtime["spec"]["containers"]
    port = container["ports"].pop()
    assert port == {"name": "grpc-port", "containerPort": 9000, "protocol": "TCP"}
    container["env"].remove({"name": "FOVEA_GRPC_PORT", "value": str(port["containerPort"])})
    container["image"] = container["image"].removesuffix("-grpc")
    assert runtime["spec"]["protocolVersions"].pop() == "grpc-v2"
    assert not any(one["autoSelect"] for one in runtime["spec"]["supportedModelFormats"])
    runtime["spec"]["supportedModelFormats"] = RUNTIME["spec"]["supportedModelFormats"]
    assert runtime["metadata"].pop("name") == "fovea-grpc"
    runtime["metadata"]["name"] = "fovea"
    assert runtime == RUNTIME


def test_sample_chooses_the_mode_that_takes_its_fields() -> None:
    """Knative, the default of older versions of KServe, refuses a pod that names its grace period."""
    assert "terminationGracePeriodSeconds" in SAMPLE["spec"]["predictor"]
    assert SAMPLE["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    grace = SAMPLE["spec"]["predictor"]["terminationGracePeriodSeconds"]
    fields = Settings.model_fields
    assert grace >= fields["drain_grace"].default + fields["drain_limit"].default + 3


@pytest.mark.long
@pytest.mark.parametrize("layout", [".", "7"], ids=["file", "versions"])
def test_service_with_the_variables_of_the_runtime_answers_both_protocols(
    tmp_path: Path, layout: str
) -> None:
    """Play KServe: another folder and port, a read-only model, and the name of the InferenceService."""
    name = SAMPLE["metadata"]["name"]
    models, state = tmp_path / "models", tmp_path / "state"
    (models / layout).mkdir(parents=True)
    state.mkdir()
    shutil.copy(DEFAULT_MODEL, models / layout)
    for folder in (models / layout, models):
        folder.chmod(0o555)
    variables = {
        **{variable: value.replace("{{.Name}}", name) for variable, value in ENVIRONMENT.items()},
        "FOVEA_HOST": "127.0.0.1", "FOVEA_PORT": "0", "FOVEA_MODELS": str(models), "FOVEA_STATE": str(state),
    }  # fmt: skip
    with Server(**variables) as server:
        for probe in ("readinessProbe", "livenessProbe"):
            assert server.client.get(CONTAINER[probe]["httpGet"]["path"]).status_code == 200
        metrics = server.client.get(RUNTIME["spec"]["annotations"]["prometheus.kserve.io/path"]).text
        assert sum_samples(metrics, "fovea_model_info", model=name) == 1
        # v1 is TensorFlow's REST API, v2 the Open Inference Protocol.
        assert server.client.get(f"/v1/models/{name}").status_code == 200
        body = {"instances": [{"b64": base64.b64encode(SHIP).decode()}]}
        reply = server.client.post(f"/v1/models/{name}:predict", json=body)
        assert len(reply.json()["predictions"]) == 1
        assert server.client.get(f"/v2/models/{name}/ready").status_code == 200
        metadata = server.client.get(f"/v2/models/{name}").json()
        assert metadata["name"] == name
        tensor = {"name": metadata["inputs"][0]["name"], "shape": [1], "datatype": "BYTES"}
        data = [base64.b64encode(SHIP).decode()]
        reply = server.client.post(f"/v2/models/{name}/infer", json={"inputs": [{**tensor, "data": data}]})
        assert reply.status_code == 200, reply.text
        assert reply.json()["model_name"] == name
        if layout != ".":
            assert metadata["versions"] == [layout]
    for folder in (models, models / layout):
        folder.chmod(0o755)


@pytest.mark.long
def test_service_with_the_variables_of_the_runtime_answers_grpc(tmp_path: Path) -> None:
    name = SAMPLE["metadata"]["name"]
    shutil.copy(DEFAULT_MODEL, tmp_path)
    (container,) = GRPC_RUNTIME["spec"]["containers"]
    variables = {
        **{one["name"]: one["value"].replace("{{.Name}}", name) for one in container["env"]},
        "FOVEA_HOST": "127.0.0.1", "FOVEA_PORT": "0", "FOVEA_GRPC_PORT": "0",
        "FOVEA_MODELS": str(tmp_path), "FOVEA_STATE": str(tmp_path),
    }  # fmt: skip
    request = pb.ModelInferRequest(model_name=name)
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(SHIP)
    with Server(**variables) as server, open_channel(server) as channel:
        stub = create_stub(channel)
        assert stub.ModelReady(pb.ModelReadyRequest(name=name)).ready
        assert stub.ModelInfer(request).model_name == name


def test_page_explains_every_file() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for path in FOLDER.iterdir():
        assert f"deploy/kserve/{path.name}" in page
    assert re.search(r"^## KServe$", page, re.MULTILINE)
