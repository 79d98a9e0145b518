"""`make bench-gpu` on a CPU: its tables, its budget and its refusals."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fovea.bench.gpu import EndToEnd, OutOfTimeError, describe_limit, limit_time, main
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from tests.export.classifiers import build_classifier
from tests.export.imports import make_labels

SERVICE = EndToEnd("float32", 100, 0, decode_seconds=0.004, decode_share=0.7, client_share=0.1)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the options for a network of 16 x 16 px that is imported already."""
    folder = tmp_path / "small-16-float32"
    folder.mkdir()
    (folder / "plain.onnx").write_bytes(build_classifier().SerializeToString())
    (folder / "labels.txt").write_text("\n".join(make_labels(5)))
    preprocessing = PreprocessingOptions(preset=IMAGENET)
    import_model(
        ImportRequest(folder / "plain.onnx", folder / "labels.txt", "network", folder / "zoo", preprocessing)
    )
    return [
        *("--folder", str(tmp_path), "--network", "small", "--side", "16", "--arithmetics", "float32"),
        *("--batches", "1", "3"),
    ]


@pytest.mark.long
def test_cpu_path_prints_both_tables(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--provider", "cpu", "--turn", "0.01", "--seconds", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("small on cpu: ") and "ONNX Runtime" in line for line in lines)
    for batch in (1, 3):
        (row,) = {line for line in lines if line.startswith(f"| float32 | {batch} | ")}
        assert all(float(cell) > 0 for cell in row.split("|")[3:7])
    (row,) = (line for line in lines if line.startswith("| float32 | ") and "%" in line)
    rate, failed = (float(cell) for cell in row.split("|")[2:4])
    assert rate > 0
    assert failed == 0


def test_missing_gpu_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this system has a GPU")
    assert main([*options, "--budget", "20"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("gpu: FOVEA_PROVIDER is cuda, but this ONNX Runtime has no CUDA; install ")


def test_budget_ends_the_measurement(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    started_at = time.monotonic()
    assert main([*options, "--provider", "cpu", "--budget", "0.2"]) == 1
    assert time.monotonic() < started_at + 60
    assert "0.2 s are over" in capsys.readouterr().err


def test_time_limit_is_over_after_the_block() -> None:
    with pytest.raises(OutOfTimeError), limit_time(0.01):
        while True:
            pass
    with limit_time(0.5):  # a busy machine may interrupt this process for a moment
        pass
    time.sleep(0.6)


def test_limit_is_named_with_figures() -> None:
    assert describe_limit(SERVICE, [], is_gpu=False) == "decoding"
    assert "decode at most" in describe_limit(SERVICE, [], is_gpu=True)
