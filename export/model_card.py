"""Model cards: `README.md` beside a model file, with front matter in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.model_card import CARD_FILE, ModelCard
from fovea.service.atomic_files import write_file

_LICENCE_NOTES: Final = {
    "agpl-3.0": "Programs that use these weights over a network must offer their source code under this "
    "licence, or have another licence from the owner.",
}
"""Obligations that surprise users, by licence."""

_LISTED_LABELS: Final = 100


def write_model_card(contract: Contract, origin: ModelCard, folder: Path) -> None:
    """Write the card of a model into the folder of its file. Raises `WriteError`."""
    write_file(folder / CARD_FILE, render_model_card(contract, origin))


def render_model_card(contract: Contract, origin: ModelCard) -> str:
    """Return the card's text. `origin` states where the weights come from; empty texts are left out."""
    lines = ["---", *_render_front_matter(contract, origin), "---", "", f"# {contract.name}", ""]
    lines += [f"* {text}" for text in _describe(contract, origin)]
    names = contract.labels[:_LISTED_LABELS]
    more = len(contract.labels) - len(names)
    lines += ["", "## Labels", "", ", ".join(map(_escape, names)) + (f" and {more} more" if more else "")]
    return "\n".join(lines) + "\n"


def _render_front_matter(contract: Contract, origin: ModelCard) -> Iterator[str]:
    values: dict[str, Any] = {
        "license": origin.licence,
        "library_name": "fovea",
        "pipeline_tag": "image-classification",
        "base_model": _find_hub_repository(origin.source),
        "source": origin.source,
        "source_library": origin.library,
        "labels": len(contract.labels),
        "accuracy": contract.accuracy.top1 if contract.accuracy else None,
        "calibrated": contract.temperature != 1,
    }
    yield from (f"{key}: {_render_value(value)}" for key, value in values.items() if value not in ("", None))
    yield from ("tags:", "- image-classification", "- onnx")
    if contract.accuracy:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": contract.accuracy.data, "type": contract.accuracy.data},
            "metrics": [{"type": "accuracy", "value": contract.accuracy.top1}],
        }
        # JSON is YAML: the hub reads the list, and no name can break out of its quotes.
        yield f"model-index: {json.dumps([{'name': contract.name, 'results': [result]}])}"


def _render_value(value: Any) -> str:
    """Return a value as YAML: JSON, and simple words without quotes."""
    if isinstance(value, str) and value.replace("-", "").replace(".", "").replace("/", "").isalnum():
        return value if not value.replace(".", "").isdecimal() else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def _find_hub_repository(source: str) -> str:
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else ""


def _describe(contract: Contract, origin: ModelCard) -> Iterator[str]:
    yield "An image classifier in one ONNX file for Fovea: `fovea show` in this folder describes it."
    yield f"Source: {_escape(origin.source or contract.training.data or 'not recorded')}"
    if origin.licence:
        note = _LICENCE_NOTES.get(origin.licence.lower(), "")
        yield f"Licence of the weights: {_escape(origin.licence)}.{f' {note}' if note else ''}"
    else:
        yield "Licence of the weights: not stated by the source. Look it up before you share the model."
    yield f"Task: {contract.task}, {len(contract.labels)} labels"
    yield f"Input: {contract.input.width} x {contract.input.height} pixels (width x height)"
    accuracy = contract.accuracy
    if accuracy is None:
        yield "Accuracy: not measured by Fovea"
    else:
        yield f"Accuracy: {accuracy.top1:.2%} of {accuracy.images:,} images ({_escape(accuracy.data)})"
    yield "Calibration: " + (
        f"temperature {contract.temperature:.4g}" if contract.temperature != 1 else "none (temperature 1)"
    )


def _escape(text: str) -> str:
    """Return the text with the characters escaped that mean something in Markdown or HTML."""
    return "".join(f"\\{one}" if one in "\\`*_[]<>#|" else one for one in text)
