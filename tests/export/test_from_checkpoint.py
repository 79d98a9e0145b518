"""The export of a checkpoint to one verified file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fovea.export.drift_reference import measure_reference
from fovea.export.from_checkpoint import ExportError, export_checkpoint, write_verified_model
from fovea.export.verify import BATCHES, VerificationError
from fovea.model.data.dataset import square_geometry
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks.network import to_probabilities
from fovea.service.artifact.contract import FORMAT_VERSION, METADATA_KEY, Accuracy, GoldenSet, Task, Training
from fovea.service.errors import ContractError, ModelError
from fovea.service.inference.engine import Engine
from tests.conftest import ROOT
from tests.export.conftest import ExportedModel

# --- the file ------------------------------------------------------------------------------------


def test_the_contract_says_what_the_model_is(exported: ExportedModel) -> None:
    contract, about = exported.contract, exported.checkpoint.metadata
    assert (contract.format, contract.name, contract.version) == (FORMAT_VERSION, "squares-16", "7")
    assert (contract.task, contract.labels) == (Task.MULTICLASS, ("blue", "green", "red"))
    assert contract.input == square_geometry(16)
    calibration = Calibration.from_dict(about["calibration"])
    assert (contract.thresholds, contract.temperature) == ((), calibration.temperature)
    assert tuple((one.level, one.quantile) for one in contract.coverage) == calibration.coverage
    assert contract.training == Training("squares", 12, about["commit"], "fovea train")
    assert len(contract.golden.images) == 8
    assert set(contract.golden.logit_tolerance) == {"cpu/float32", "cuda/float32"}


def test_the_stated_accuracy_is_the_network_s_on_the_test_images(exported: ExportedModel) -> None:
    measured = evaluate.measure_accuracy(exported.net, exported.data.test)
    assert 0 < measured < 1
    stated = exported.contract.accuracy
    assert stated is not None
    assert stated == Accuracy("squares, test", 150, measured, stated.ece)
    assert stated.ece == pytest.approx(exported.checkpoint.metadata["measured"]["ece"], abs=1e-4)


def test_the_reference_is_of_the_held_out_images(exported: ExportedModel) -> None:
    held_out = (exported.data.validation, exported.data.conformal)
    assert exported.contract.reference == measure_reference(exported.engine, *held_out)


def test_the_graph_takes_uint8_images_in_batches_of_any_size(exported: ExportedModel) -> None:
    (taken,) = exported.model.graph.input
    sides = [side.dim_value or "any" for side in taken.type.tensor_type.shape.dim]
    assert taken.name == exported.contract.input_name == "pixels"
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sides == ["any", 16, 16, 3]
    for batch in (1, 3, 70):
        pixels = exported.data.test.pixels[:batch]
        assert exported.engine.run(pixels.numpy()).shape == (batch, 3)


def test_the_graph_gives_logits_and_probabilities_of_the_network(exported: ExportedModel) -> None:
    assert [output.name for output in exported.model.graph.output] == ["logits", "probabilities"]
    pixels = exported.data.test.pixels[:20]
    wanted = evaluate.compute_logits(exported.net, pixels)
    np.testing.assert_allclose(exported.engine.compute_logits(pixels.numpy()), wanted, atol=1e-3)
    said = exported.engine.run(pixels.numpy())
    temperature = exported.contract.temperature
    assert temperature != 1
    np.testing.assert_allclose(said, to_probabilities(wanted, Task.MULTICLASS, temperature), atol=1e-3)


def test_the_file_says_nothing_of_the_machine_that_made_it(exported: ExportedModel) -> None:
    """The exporter records stack traces with paths at each node; the file contains none of them."""
    for trace in (str(ROOT), "site-packages", "stack_trace", "name_scopes", "class_hierarchy"):
        assert trace.encode() not in exported.content, trace
    assert [entry.key for entry in exported.model.metadata_props] == [METADATA_KEY]
    onnx.checker.check_model(exported.model)


def test_the_file_runs_where_it_is_served_and_proves_itself(exported: ExportedModel) -> None:
    proof = exported.engine.check_golden_set()
    assert proof.images == 8
    assert proof.pixel_difference == 0  # the same decoders drew it
    assert proof.logit_difference < 1e-3


def test_the_report_is_written_beside_the_model(exported: ExportedModel) -> None:
    report = exported.report
    assert exported.files == ("model.onnx", "report.json", "weights.json", "weights.safetensors")
    assert json.loads(exported.report_json) == json.loads(json.dumps(asdict(report)))
    assert (report.model, report.version, report.bytes) == ("squares-16", "7", len(exported.content))
    assert report.parameters == sum(weight.numel() for weight in exported.net.parameters())
    assert report.accuracy == exported.contract.accuracy
    assert [agreement.batch for agreement in report.agreement] == list(BATCHES) == [1, 2, 64]
    assert all(agreement.logits < 1e-3 for agreement in report.agreement)


# --- what is refused -----------------------------------------------------------------------------


def find_weight(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    tensors_by_name: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
    return next(tensor for name, tensor in tensors_by_name.items() if name.endswith(ending))


def change_tensor(tensor: onnx.TensorProto, function: Callable[[np.ndarray], np.ndarray]) -> None:
    value = function(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def scale_convolution(model: onnx.ModelProto) -> None:
    change_tensor(find_weight(model, "features.2.0.weight"), lambda kernel: kernel * 1.5)


def shift_normalisation(model: onnx.ModelProto) -> None:
    change_tensor(find_weight(model, "normalize.offset"), lambda offset: offset + 0.05)


def swap_labels(model: onnx.ModelProto) -> None:
    change_tensor(find_weight(model, "head.weight"), lambda rows: rows[[1, 0, 2]])


def set_nan_bias(model: onnx.ModelProto) -> None:
    change_tensor(find_weight(model, "head.bias"), lambda bias: bias * np.nan)


def move_softmax_to_batch(model: onnx.ModelProto) -> None:
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax.attribute[0].i = 0


def remove_softmax(model: onnx.ModelProto) -> None:
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax.op_type = "Identity"
    del softmax.attribute[:]


def fix_batch_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


@pytest.mark.parametrize(
    "corrupt",
    [
        scale_convolution,
        shift_normalisation,
        swap_labels,
        set_nan_bias,
        move_softmax_to_batch,
        remove_softmax,
        fix_batch_size,
    ],
)
def test_a_graph_that_computes_something_else_is_never_written(
    tmp_path: Path, exported: ExportedModel, corrupt: Callable[[onnx.ModelProto], None]
) -> None:
    model = exported.model
    corrupt(model)
    out = tmp_path / "squares-16" / "8"
    with pytest.raises(VerificationError):
        write_verified_model(
            exported.net, model, exported.contract, exported.report.accuracy, exported.data.test, out
        )
    assert not out.exists()


def test_a_refused_graph_leaves_the_earlier_file(tmp_path: Path, exported: ExportedModel) -> None:
    model = exported.model
    scale_convolution(model)
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(VerificationError):
        write_verified_model(
            exported.net, model, exported.contract, exported.report.accuracy, exported.data.test, tmp_path
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"


def test_a_sound_graph_takes_the_place_of_the_earlier(tmp_path: Path, exported: ExportedModel) -> None:
    """The file is replaced, not overwritten: a process with the earlier file open still reads that."""
    out = tmp_path / "squares-16" / "7"
    out.mkdir(parents=True)
    (out / "model.onnx").write_bytes(b"earlier")
    (tmp_path / "opened").hardlink_to(out / "model.onnx")
    write_verified_model(
        exported.net, exported.model, exported.contract, exported.report.accuracy, exported.data.test, out
    )
    assert (tmp_path / "opened").read_bytes() == b"earlier"
    assert (out / "model.onnx").read_bytes() == exported.content
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "report.json"]


def test_a_golden_set_that_is_not_this_network_s_is_never_written(
    tmp_path: Path, exported: ExportedModel
) -> None:
    contract = exported.contract
    first, *others = contract.golden.images
    wrong = replace(first, logits=tuple(logit + 0.01 for logit in first.logits))
    golden = GoldenSet(contract.golden.logit_tolerance, (wrong, *others))
    with pytest.raises(ModelError, match=r"golden image 'jpeg-420-orientation-6': a logit is off by 0.01"):
        write_verified_model(
            exported.net,
            exported.model,
            replace(contract, golden=golden),
            exported.report.accuracy,
            exported.data.test,
            tmp_path / "1",
        )
    assert not (tmp_path / "1").exists()


def test_a_contract_that_does_not_fit_the_graph_is_never_written(
    tmp_path: Path, exported: ExportedModel
) -> None:
    contract = replace(exported.contract, input=square_geometry(32))
    with pytest.raises(ContractError, match="the graph takes"):
        write_verified_model(
            exported.net,
            exported.model,
            contract,
            exported.report.accuracy,
            exported.data.test,
            tmp_path / "1",
        )
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("out", ["zoo/squares", "zoo/squares/v1", "zoo/squares/1.0", "/", "/1", "."])
def test_the_folder_must_name_model_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: ExportedModel, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ExportError, match="cannot hold a model: the path must end in <name>/<number>, such as zoo/pets/1"
    ):
        export_checkpoint(exported.checkpoint, exported.data, Path(out))
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path, exported: ExportedModel) -> None:
    """The checkpoint of an interrupted run has weights, but neither temperature nor thresholds."""
    about = {key: value for key, value in exported.checkpoint.metadata.items() if key != "calibration"}
    with pytest.raises(ExportError, match="before its end; continue it with `fovea train --resume`"):
        export_checkpoint(
            replace(exported.checkpoint, metadata=about), exported.data, tmp_path / "zoo" / "squares" / "1"
        )
    assert not list(tmp_path.iterdir())


def test_data_of_other_labels_are_refused(tmp_path: Path, exported: ExportedModel) -> None:
    data = replace(exported.data, labels=("red", "green", "blue"))
    with pytest.raises(ExportError, match=r"the checkpoint has labels .*, the data "):
        export_checkpoint(exported.checkpoint, data, tmp_path / "zoo" / "squares" / "1")
    assert not list(tmp_path.iterdir())


def test_the_trained_network_is_what_is_served(exported: ExportedModel) -> None:
    """Golden logits are the network's own, for the pixels that the service will see."""
    from fovea.service.inference.engine import decode_golden_pixels

    for image in exported.contract.golden.images:
        pixels = torch.from_numpy(decode_golden_pixels(image))[None]
        wanted = evaluate.compute_logits(exported.net, pixels)[0].tolist()
        assert image.logits == pytest.approx(wanted, abs=1e-4)
    assert Engine(exported.content, provider="cpu", threads=1).contract == exported.contract
