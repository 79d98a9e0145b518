"""Model cards: front matter that the hub reads, and the parts of it that Fovea reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fovea.export.model_card import render_model_card, write_model_card
from fovea.service.artifact.contract import Accuracy
from fovea.service.artifact.model_card import ModelCard, read_front_matter, read_model_card
from tests.graphs import build_model, read_contract

CONTRACT = read_contract(build_model())
ORIGIN = ModelCard(f"hf:google/vit@{'1' * 40}, onnx/model.onnx", "apache-2.0", "transformers")


def test_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_model_card(CONTRACT, ORIGIN, tmp_path)
    assert read_model_card(tmp_path) == ORIGIN


def test_front_matter_is_what_the_hub_expects() -> None:
    contract = replace(CONTRACT, accuracy=Accuracy('my "photos": 1', 40, 0.25, None), temperature=1.5)
    _, text, body = render_model_card(contract, ORIGIN).split("---\n", 2)
    values = yaml.safe_load(text)
    assert values == {
        "license": "apache-2.0",
        "library_name": "fovea",
        "pipeline_tag": "image-classification",
        "base_model": "google/vit",
        "source": ORIGIN.source,
        "source_library": "transformers",
        "labels": len(contract.labels),
        "accuracy": 0.25,
        "calibrated": True,
        "tags": ["image-classification", "onnx"],
        "model-index": [
            {
                "name": contract.name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": 'my "photos": 1', "type": 'my "photos": 1'},
                        "metrics": [{"type": "accuracy", "value": 0.25}],
                    }
                ],
            }
        ],
    }
    for line in ("* Accuracy: 25.00% of 40 images", "* Calibration: temperature 1.5"):
        assert line in body


def test_card_without_origin_says_that_the_licence_is_unknown() -> None:
    text = render_model_card(replace(CONTRACT, accuracy=None), ModelCard())
    assert "license" not in yaml.safe_load(text.split("---\n", 2)[1])
    assert "* Licence of the weights: not stated by the source." in text
    assert "* Accuracy: not measured by Fovea" in text


@pytest.mark.parametrize("label", ["a\\b", "<b>", "[x](y)", "# head", "a|b"])
def test_labels_cannot_break_the_card(label: str) -> None:
    contract = replace(CONTRACT, labels=(label, *CONTRACT.labels[1:]), reference=None)
    last_line = render_model_card(contract, ModelCard()).splitlines()[-1]
    for one in "\\`*_[]<>#|":
        assert last_line.replace(f"\\{one}", "").count(one) == 0 or one == "\\"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense: mit\n", {}),  # without an end
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: 'mit'\r\n---\r\n", {"license": "mit"}),
        (
            '---\nsource: "a: \\"b\\""\nlanguage:\n- en\n  nested: x\n# license: gpl\n---\n',
            {"source": 'a: "b"'},
        ),
        ("---\nlicense:\n---\n", {}),
    ],
)
def test_front_matter_of_other_tools_is_read(tmp_path: Path, text: str, values: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == values


def test_missing_or_binary_card_has_no_facts(tmp_path: Path) -> None:
    assert read_model_card(tmp_path) == ModelCard()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert read_model_card(tmp_path).licence == "\ufffd\ufffd"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert read_model_card(tmp_path) == ModelCard()
