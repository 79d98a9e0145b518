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

# --- the model file ------------------------------------------------------------------------------


def test_contract_describes_the_model(exported_model: ExportedModel) -> None:
    contract, metadata = exported_model.contract, exported_model.checkpoint.metadata
    assert (contract.format, contract.name, contract.version) == (FORMAT_VERSION, "squares-16", "7")
    assert (contract.task, contract.labels) == (Task.MULTICLASS, ("blue", "green", "red"))
    assert contract.input == square_geometry(16)
    calibration = Calibration.from_dict(metadata["calibration"])
    assert (contract.thresholds, contract.temperature) == ((), calibration.temperature)
    assert tuple((entry.level, entry.quantile) for entry in contract.coverage) == calibration.coverage
    assert contract.training == Training("squares", 12, metadata["commit"], "fovea train")
    assert len(contract.golden.images) == 8
    assert set(contract.golden.logit_tolerance) == {"cpu/float32", "cuda/float32"}


def test_contract_accuracy_is_measured_on_the_test_images(exported_model: ExportedModel) -> None:
    top1 = evaluate.measure_accuracy(exported_model.net, exported_model.data.test)
    assert 0 < top1 < 1
    accuracy = exported_model.contract.accuracy
    assert accuracy is not None
    assert accuracy == Accuracy("squares, test", 150, top1, accuracy.ece)
    assert accuracy.ece == pytest.approx(exported_model.checkpoint.metadata["measured"]["ece"], abs=1e-4)


def test_drift_reference_uses_the_held_out_images(exported_model: ExportedModel) -> None:
    held_out = (exported_model.data.validation, exported_model.data.conformal)
    assert exported_model.contract.reference == measure_reference(exported_model.engine, *held_out)


def test_graph_takes_uint8_batches_of_any_size(exported_model: ExportedModel) -> None:
    (graph_input,) = exported_model.model.graph.input
    sides = [side.dim_value or "any" for side in graph_input.type.tensor_type.shape.dim]
    assert graph_input.name == exported_model.contract.input_name == "pixels"
    assert graph_input.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sides == ["any", 16, 16, 3]
    for batch in (1, 3, 70):
        pixels = exported_model.data.test.pixels[:batch]
        assert exported_model.engine.run(pixels.numpy()).shape == (batch, 3)


def test_graph_outputs_equal_the_network_outputs(exported_model: ExportedModel) -> None:
    assert [output.name for output in exported_model.model.graph.output] == ["logits", "probabilities"]
    pixels = exported_model.data.test.pixels[:20]
    expected_logits = evaluate.compute_logits(exported_model.net, pixels)
    np.testing.assert_allclose(
        exported_model.engine.compute_logits(pixels.numpy()), expected_logits, atol=1e-3
    )
    probabilities = exported_model.engine.run(pixels.numpy())
    temperature = exported_model.contract.temperature
    assert temperature != 1
    np.testing.assert_allclose(
        probabilities, to_probabilities(expected_logits, Task.MULTICLASS, temperature), atol=1e-3
    )


def test_model_file_has_no_traces_of_the_build_machine(exported_model: ExportedModel) -> None:
    """The exporter records stack traces with paths at each node; the file contains none of them."""
    for trace in (str(ROOT), "site-packages", "stack_trace", "name_scopes", "class_hierarchy"):
        assert trace.encode() not in exported_model.content, trace
    assert [entry.key for entry in exported_model.model.metadata_props] == [METADATA_KEY]
    onnx.checker.check_model(exported_model.model)


def test_exported_model_passes_its_golden_set(exported_model: ExportedModel) -> None:
    differences = exported_model.engine.check_golden_set()
    assert differences.images == 8
    assert differences.pixel_difference == 0  # the same decoders wrote it
    assert differences.logit_difference < 1e-3


def test_report_is_written_beside_the_model(exported_model: ExportedModel) -> None:
    report = exported_model.report
    assert exported_model.files == (
        "README.md",
        "model.onnx",
        "report.json",
        "weights.json",
        "weights.safetensors",
    )
    assert json.loads(exported_model.report_json) == json.loads(json.dumps(asdict(report)))
    assert (report.model, report.version, report.bytes) == ("squares-16", "7", len(exported_model.content))
    assert report.parameters == sum(weight.numel() for weight in exported_model.net.parameters())
    assert report.accuracy == exported_model.contract.accuracy
    assert [agreement.batch for agreement in report.agreement] == list(BATCHES) == [1, 2, 64]
    assert all(agreement.logits < 1e-3 for agreement in report.agreement)


# --- refusals ------------------------------------------------------------------------------------


def find_weight(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    tensors_by_name: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
    return next(tensor for name, tensor in tensors_by_name.items() if name.endswith(ending))


def change_tensor(tensor: onnx.TensorProto, function: Callable[[np.ndarray], np.ndarray]) -> None:
    value = function(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def scale_convolution(model: onnx.ModelProto) -> None:
    change_tensor(find_weight(model, "features.2.0.weight"), lambda kernel: kernel * 1.5)


def shift_normalisation(model: onnx.ModelProto) -> None:
    (normalization,) = [node for node in model.graph.node if node.name.startswith("fovea/arranged/batch")]
    change_tensor(find_weight(model, normalization.input[2]), lambda offset: offset + 0.05)


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
def test_graph_with_wrong_results_is_not_written(
    tmp_path: Path, exported_model: ExportedModel, corrupt: Callable[[onnx.ModelProto], None]
) -> None:
    model = exported_model.model
    corrupt(model)
    out = tmp_path / "squares-16" / "8"
    with pytest.raises(VerificationError):
        write_verified_model(
            exported_model.net,
            model,
            exported_model.contract,
            exported_model.report.accuracy,
            exported_model.data.test,
            out,
        )
    assert not out.exists()


def test_refused_graph_leaves_the_earlier_file(tmp_path: Path, exported_model: ExportedModel) -> None:
    model = exported_model.model
    scale_convolution(model)
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(VerificationError):
        write_verified_model(
            exported_model.net,
            model,
            exported_model.contract,
            exported_model.report.accuracy,
            exported_model.data.test,
            tmp_path,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"


def test_valid_graph_replaces_the_earlier_file(tmp_path: Path, exported_model: ExportedModel) -> None:
    """The file is replaced, not overwritten: a process with the earlier file open still reads that."""
    out = tmp_path / "squares-16" / "7"
    out.mkdir(parents=True)
    (out / "model.onnx").write_bytes(b"earlier")
    (tmp_path / "opened").hardlink_to(out / "model.onnx")
    write_verified_model(
        exported_model.net,
        exported_model.model,
        exported_model.contract,
        exported_model.report.accuracy,
        exported_model.data.test,
        out,
    )
    assert (tmp_path / "opened").read_bytes() == b"earlier"
    assert (out / "model.onnx").read_bytes() == exported_model.content
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.onnx", "report.json"]


def test_golden_set_of_another_network_is_refused(tmp_path: Path, exported_model: ExportedModel) -> None:
    contract = exported_model.contract
    first, *others = contract.golden.images
    wrong_image = replace(first, logits=tuple(logit + 0.01 for logit in first.logits))
    golden = GoldenSet(contract.golden.logit_tolerance, (wrong_image, *others))
    with pytest.raises(ModelError, match=r"golden image 'jpeg-420-orientation-6': a logit is off by 0.01"):
        write_verified_model(
            exported_model.net,
            exported_model.model,
            replace(contract, golden=golden),
            exported_model.report.accuracy,
            exported_model.data.test,
            tmp_path / "1",
        )
    assert not (tmp_path / "1").exists()


def test_contract_that_does_not_fit_the_graph_is_refused(
    tmp_path: Path, exported_model: ExportedModel
) -> None:
    contract = replace(exported_model.contract, input=square_geometry(32))
    with pytest.raises(ContractError, match="the graph takes"):
        write_verified_model(
            exported_model.net,
            exported_model.model,
            contract,
            exported_model.report.accuracy,
            exported_model.data.test,
            tmp_path / "1",
        )
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("out", ["zoo/squares", "zoo/squares/v1", "zoo/squares/1.0", "/", "/1", "."])
def test_folder_must_name_model_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported_model: ExportedModel, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ExportError, match="cannot hold a model: the path must end in <name>/<number>, such as zoo/pets/1"
    ):
        export_checkpoint(exported_model.checkpoint, exported_model.data, Path(out))
    assert not list(tmp_path.iterdir())


def test_unfinished_run_is_refused(tmp_path: Path, exported_model: ExportedModel) -> None:
    """The checkpoint of an interrupted run has weights, but neither temperature nor thresholds."""
    metadata = {
        key: value for key, value in exported_model.checkpoint.metadata.items() if key != "calibration"
    }
    with pytest.raises(ExportError, match="before its end; continue it with `fovea train --resume`"):
        export_checkpoint(
            replace(exported_model.checkpoint, metadata=metadata),
            exported_model.data,
            tmp_path / "zoo" / "squares" / "1",
        )
    assert not list(tmp_path.iterdir())


def test_data_with_other_labels_are_refused(tmp_path: Path, exported_model: ExportedModel) -> None:
    data = replace(exported_model.data, labels=("red", "green", "blue"))
    with pytest.raises(ExportError, match=r"the checkpoint has labels .*, the data "):
        export_checkpoint(exported_model.checkpoint, data, tmp_path / "zoo" / "squares" / "1")
    assert not list(tmp_path.iterdir())


def test_golden_logits_are_those_of_the_trained_network(exported_model: ExportedModel) -> None:
    """Golden logits are the network's own, for the pixels that the service will see."""
    from fovea.service.inference.engine import decode_golden_pixels

    for image in exported_model.contract.golden.images:
        pixels = torch.from_numpy(decode_golden_pixels(image))[None]
        expected_logits = evaluate.compute_logits(exported_model.net, pixels)[0].tolist()
        assert image.logits == pytest.approx(expected_logits, abs=1e-4)
    assert Engine(exported_model.content, provider="cpu", threads=1).contract == exported_model.contract
