"""`make bench-oip`: both sides compute the same, of one array."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from fovea.bench.oip import make_bare_runner, open_inference_client
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from tests.export.classifiers import build_classifier
from tests.export.imports import make_labels
from tests.servers import Server


def test_the_service_and_the_bare_runtime_say_the_same(tmp_path: Path) -> None:
    plain, labels = tmp_path / "plain.onnx", tmp_path / "labels.txt"
    plain.write_bytes(build_classifier().SerializeToString())
    labels.write_text("\n".join(make_labels(5)))
    import_model(
        ImportRequest(plain, labels, "network", tmp_path / "zoo", PreprocessingOptions(preset=IMAGENET))
    )
    array = np.random.default_rng(0).normal(0, 1, (6, 3, 16, 16)).astype(np.float32)
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:
        address = urlsplit(server.url)
        with open_inference_client(str(address.hostname), int(address.port or 0), array) as ask:
            assert np.abs(make_bare_runner(plain, 1)(array) - ask()).max() < 1e-5
