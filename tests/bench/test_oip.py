"""`make bench-oip`: the service and the bare runtime compute the same."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from fovea.bench.oip import make_bare_runner, open_inference_client
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from tests.export.classifiers import build_classifier
from tests.export.imports import make_labels
from tests.servers import Server


@pytest.mark.long
def test_service_and_bare_runtime_agree(tmp_path: Path) -> None:
    model_file, label_file = tmp_path / "plain.onnx", tmp_path / "labels.txt"
    model_file.write_bytes(build_classifier().SerializeToString())
    label_file.write_text("\n".join(make_labels(5)))
    import_model(
        ImportRequest(
            model_file, label_file, "network", tmp_path / "zoo", PreprocessingOptions(preset=IMAGENET)
        )
    )
    array = np.random.default_rng(0).normal(0, 1, (6, 3, 16, 16)).astype(np.float32)
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:
        address = urlsplit(server.url)
        with open_inference_client(str(address.hostname), int(address.port or 0), array) as infer:
            assert np.abs(make_bare_runner(model_file, 1)(array) - infer()).max() < 1e-5
