"""Our protocol file: its generated modules, and the comparison with Triton's."""

from __future__ import annotations

from pathlib import Path

from fovea.service.grpc import inference_pb2
from tests.service.grpc.descriptors import describe_file
from tests.service.grpc.generate import FOLDER, generate_modules
from tests.service.grpc.triton_process import run_triton

# Triton's configuration has 90 further fields for its own features.
PARTIAL_MESSAGES = {"ModelConfig", "ModelInput", "ModelOutput"}

METHODS_LEFT_OUT = ("SharedMemory", "Trace", "LogSettings")


def test_generated_modules_are_up_to_date(tmp_path: Path) -> None:
    generate_modules(tmp_path)
    for name in ("inference_pb2.py", "inference_pb2.pyi"):
        generated, kept = (tmp_path / name).read_text(), (FOLDER / name).read_text()
        assert generated == kept, f"run python -m tests.service.grpc.generate to write {name}"


def test_every_field_is_that_of_triton() -> None:
    triton, own = run_triton("descriptors")["descriptors"], describe_file(inference_pb2.DESCRIPTOR)
    assert len(own["messages"]) > 40
    for name, message in own["messages"].items():
        other = triton["messages"][name]
        if name.removeprefix("inference.") in PARTIAL_MESSAGES:
            fields = {field: one for field, one in other["fields"].items() if field in message["fields"]}
            other = {**other, "fields": fields}
        assert message == other, name
    assert own["enums"] == {name: triton["enums"][name] for name in own["enums"]}
    assert own["methods"] == {
        name: method
        for name, method in triton["methods"].items()
        if not any(part in name for part in METHODS_LEFT_OUT)
    }
