"""Fixtures for the tests of `export/`: one real training run and its export."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from fovea.export.from_checkpoint import ExportReport, export_checkpoint
from fovea.model.data.dataset import Dataset, Examples
from fovea.model.evaluation.finalize import finalize_run
from fovea.model.networks.checkpoint import Checkpoint
from fovea.model.networks.network import Net
from fovea.service.artifact.contract import Contract
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.inference.engine import Engine
from tests.graphs import read_contract
from tests.training import SHORT_RECIPE, draw_dataset, train_quietly


@pytest.fixture(scope="session", autouse=True)
def _use_one_thread() -> None:
    """Use one thread: tests run in parallel, and OpenMP is very slow with more threads than free cores."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ExportedModel:
    """A training run and its export."""

    checkpoint: Checkpoint
    data: Dataset
    report: ExportReport
    content: bytes
    """Content of the model file."""
    files: tuple[str, ...]
    """Names of all files in the model's folder."""
    report_json: str

    @property
    def net(self) -> Net:
        """Return a new copy of the trained network."""
        return self.checkpoint.build_net().eval()

    @property
    def model(self) -> onnx.ModelProto:
        """Return a new copy of the model file's graph."""
        return onnx.load_from_string(self.content)

    @property
    def contract(self) -> Contract:
        """Contract in the model file."""
        return read_contract(self.model)

    @property
    def engine(self) -> Engine:
        """Return an engine with the model file, as the service loads it."""
        return Engine(self.content, provider="cpu", threads=1)


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """Return a network of three labels at 16 x 16, whose test images are noise that it often gets wrong."""
    folder = tmp_path_factory.mktemp("exported")
    random = np.random.default_rng(0)
    noise = torch.from_numpy(random.integers(0, 256, (150, 16, 16, 3), dtype=np.uint8))
    data = replace(
        draw_dataset(folder / "squares"), test=Examples(noise, torch.from_numpy(random.integers(0, 3, 150)))
    )
    trained_checkpoint = train_quietly(data, replace(SHORT_RECIPE, peak_lr=0.02), folder / "run")
    if trained_checkpoint is None:
        raise RuntimeError("the training was interrupted")
    checkpoint = finalize_run(trained_checkpoint, data, folder / "run", Console(file=io.StringIO()))
    out = folder / "zoo" / "squares-16" / "7"
    report = export_checkpoint(checkpoint, data, out)
    return ExportedModel(
        checkpoint=checkpoint,
        data=data,
        report=report,
        content=(out / MODEL_FILE).read_bytes(),
        files=tuple(sorted(path.name for path in out.iterdir())),
        report_json=(out / "report.json").read_text(),
    )
