"""`fovea.load` of models on the Hugging Face hub, which a stub stands for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.importer.sources.layouts import LABELS, write_hub_folder
from tests.hub import HubRepository, run_hub
from tests.pictures import make_jpeg
from tests.servers import ROOT

COMMIT = "1" * 40
GONE = "http://127.0.0.1:9"
"""Address without a server."""

SCRIPT = """
import json, sys
import fovea
for source in sys.argv[2:]:
    try:
        result = fovea.load(source).classify(sys.argv[1], top_k=0)
        print(json.dumps({"model": result.model.name, "labels": [one.label for one in result.predictions]}))
    except fovea.ModelError as error:
        print(json.dumps({"error": str(error)}))
"""


def load_and_classify(folder: Path, address: str, *sources: str, **variables: str) -> list[dict[str, Any]]:
    """Load the sources one after the other in a process with its own home; return a line for each."""
    image = folder / "image.jpg"
    image.write_bytes(make_jpeg(90, 70, 1))
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **variables,
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, image, *sources],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.long
def test_model_of_the_hub_is_imported_once_for_each_commit(tmp_path: Path) -> None:
    repository = HubRepository(write_hub_folder(tmp_path / "hub"))
    with run_hub(house__vit=repository) as hub:
        first, second = load_and_classify(tmp_path, hub.address, "hf:house/vit", f"hf:house/vit@{COMMIT}")
        assert first == second
        assert first["model"] == "vit"
        assert sorted(first["labels"]) == sorted(LABELS)
        weights = [one for one in hub.requests if one.startswith("GET") and one.endswith("/onnx/model.onnx")]
        assert len(weights) == 1
        assert len(list((tmp_path / "cache").rglob("model.onnx"))) == 1
        repository.commit = "2" * 40
        assert load_and_classify(tmp_path, hub.address, "hf:house/vit") == [first]
        assert len(list((tmp_path / "cache").rglob("model.onnx"))) == 2
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert load_and_classify(tmp_path, GONE, f"hf:house/vit@{COMMIT}", **variables) == [first]


@pytest.mark.long
def test_model_that_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    """A repository that says nothing about its pixels needs options, which `load` does not take."""
    silent = write_hub_folder(tmp_path / "silent", **{"preprocessor_config.json": None})
    with run_hub(house__silent=HubRepository(silent)) as hub:
        asked, missing, malformed = load_and_classify(
            tmp_path, hub.address, "hf:house/silent", "hf:house/nothing", "hf:nothing"
        )
    assert "such as: fovea import hf:house/silent " in asked["error"]
    assert "--preset imagenet" in asked["error"]
    assert "there is no repository house/nothing on the hub" in missing["error"]
    assert "is not hf:OWNER/MODEL" in malformed["error"]
    assert not list((tmp_path / "cache").rglob("model.onnx"))
