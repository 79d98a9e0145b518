"""`fovea quantize` on the command line, and its versions in the service."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from fovea.service.inference.engine import Engine
from tests.commands import Command, make_command
from tests.export.quantize.models import add_version, build_colour_graph, draw_images
from tests.graphs import with_contract
from tests.servers import FLOAT_MODEL, Server, run_service


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return make_command(monkeypatch)


def test_output_shows_loss_proof_and_version(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    images = draw_images(tmp_path / "photos", 30)
    source = add_version(build_colour_graph(), tmp_path / "my zoo")
    arguments = ["--images", images, "--calibration", 20, "--max-loss", 3, "--min-speedup", 0]
    assert command("quantize", source, *arguments) == 0
    output = capsys.readouterr().out
    assert "20 images calibrate, 100 are held out" in output
    assert re.search(r"accuracy  \d+ → \d+ of 100 right, [+-]\d\.\d\d points lost \(.* to .*\)", output)
    assert re.search(r"proof     a loss of at most 3 points is \d+\.\d % sure; .* images", output)
    assert "speed     not measured: --min-speedup is 0" in output
    assert f"wrote {tmp_path}/my zoo/colours/2/model.onnx" in output
    assert f"next: fovea serve '{tmp_path}/my zoo'" in output


@pytest.mark.long
def test_service_serves_and_explains_int8_and_refuses_another_arithmetic(
    tmp_path: Path, command: Command
) -> None:
    images = draw_images(tmp_path / "photos", 30)
    source = add_version(build_colour_graph(2), tmp_path / "zoo")
    assert command("quantize", source, "--images", images, "--max-loss", 3, "--min-speedup", 0) == 0
    photo = (images / "red" / "000.png").read_bytes()
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:
        reply = server.client.post("/v1/classify", content=photo).json()
        assert reply["model"] == {"name": "colours", "version": "2"}
        for method in ("cam", "occlusion"):
            answer = server.client.post(f"/v1/explain?method={method}&format=json&samples=64", content=photo)
            assert answer.status_code == 200, answer.text
            assert answer.json()["method"] == method
    path = source.parent / "2" / "model.onnx"
    contract = Engine.load(path, provider="cpu", threads=1).contract
    first, *others = contract.golden.images
    shifted = replace(first, logits=tuple(one + 1 for one in first.logits))
    golden = replace(contract.golden, images=(shifted, *others))
    onnx.save(with_contract(onnx.load(path), replace(contract, golden=golden)), path)
    result = run_service(FOVEA_MODELS=str(path))
    assert result.returncode == 2
    assert "The int8 arithmetic of this processor differs from that of" in result.stderr
    assert "or serve version 1" in result.stderr


@pytest.mark.slow
def test_default_model_passes_the_gate(
    cifar_test: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of the test images of CIFAR-10 (JPEG files); the speed-up needs VNNI or ARM."""
    images = tmp_path / "images"
    for path in sorted(cifar_test.glob("*/*.jpg"))[::10]:
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, images / path.parent.name / path.name)
    source = tmp_path / "zoo" / "cifar10" / "3"
    source.mkdir(parents=True)
    shutil.copyfile(FLOAT_MODEL, source / "model.onnx")
    assert command("quantize", source, "--images", images, "--max-loss", 1, "--min-speedup", 0) == 0
    engine = Engine.load(source.parent / "4" / "model.onnx", provider="cpu", threads=1)
    quantization = engine.contract.quantization
    assert quantization is not None
    assert quantization.images == 900
    assert quantization.agreement > 0.97
    assert engine.check_golden_set().images == 8
