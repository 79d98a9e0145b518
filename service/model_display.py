"""Models on the terminal, for `fovea models` and `fovea show`: the list of a repository, and one contract."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fovea.service.artifact.contract import Contract, Quantization, Task
from fovea.service.artifact.geometry import Geometry, PixelPath
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.artifact.model_card import read_model_card
from fovea.service.errors import ModelError
from fovea.service.rollout.inventory import Inventory, InventoryEntry

_PIPE_COLUMNS: Final = 10_000
"""Width of the table where no terminal reads it: programs expect one line for each version."""

_WIDE_COLUMNS: Final = 100
"""Width of a terminal from which the columns are two spaces apart; otherwise one."""

_SHOWN_LABELS: Final = 10

_TASKS: Final = {
    Task.MULTICLASS: "exactly one label is true",
    Task.BINARY: "the second label is true or false",
    Task.MULTILABEL: "any number of labels is true",
}

_PIXEL_PATHS: Final = {
    PixelPath.EXACT: "exact, as Pillow computes them",
    PixelPath.FAST: "fast, decoded at a smaller scale if that is enough",
}

_PIXEL_OPERATORS: Final = frozenset(
    {"Add", "BatchNormalization", "Cast", "Clip", "Concat", "Div", "Gather", "Identity", "Mul"}
    | {"Reshape", "Split", "Sub", "Transpose"}
)
"""ONNX operators that may stand between the pixels and the first layer with weights."""


def format_path(path: Path) -> str:
    """Return the path as printable text; a file name need not be valid UTF-8."""
    return _make_printable(os.fsencode(path).decode(errors="replace"))


def _make_printable(text: str) -> str:
    """Return the text with control characters escaped: a file must not control the terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


# --- the list of a repository --------------------------------------------------------------------


def show_inventory(inventory: Inventory, root: Path, *, as_json: bool) -> None:
    """Print the versions in the repository `root`, for people or as one JSON object."""
    if as_json:
        print(json.dumps(_render_inventory(inventory, root)))
        return
    if not inventory.entries:
        print(f"{format_path(root)} has no <name>/<version>/model.onnx yet")
    else:
        console = Console(highlight=False, markup=False)
        # Text is laid out for the terminal that shows it. In a pipe, the width of a terminal has no meaning.
        width = console.width if console.is_terminal else _PIPE_COLUMNS
        Console(highlight=False, markup=False, width=width).print(
            _create_table(inventory.entries, 2 if width >= _WIDE_COLUMNS else 1)
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for one in inventory.entries:
        if one.reason:
            console.print(f"{_format_name(one)} is not served: {_make_printable(one.reason)}")
    if inventory.default_model:
        console.print(f"default model: {_format_model_name(inventory.default_model)}")
    if inventory.start_error:
        console.print(f"a start would end with an error: {_make_printable(inventory.start_error)}")


def _create_table(entries: Iterable[InventoryEntry], gap: int) -> Table:
    """Return the table, with `gap` spaces between the columns."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("labels", "input"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("task", "precision"):
        table.add_column(heading, no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("calibrated", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("served", no_wrap=True)
    entries = list(entries)
    has_licence = any(one.card.licence for one in entries)
    if has_licence:
        table.add_column("licence", overflow="fold")
    for one in entries:
        size = "-" if one.size is None else f"{one.size / 1e6:.1f} MB"
        cells = [_format_name(one), *_format_contract_cells(one.contract), size]
        served = Text("yes", "green") if one.is_served else Text("no", "red" if one.reason else "")
        licence = [Text(_make_printable(one.card.licence or "-"))] if has_licence else []
        table.add_row(*map(Text, cells), served, *licence)
    return table


def _format_contract_cells(contract: Contract | None) -> Sequence[str]:
    if contract is None:
        return ["-"] * 6
    return (
        str(len(contract.labels)),
        f"{contract.input.width}x{contract.input.height}",
        contract.task,
        _get_precision(contract),
        f"{contract.accuracy.top1:.2%}" if contract.accuracy else "-",
        "yes" if _is_calibrated(contract) else "no",
    )


def _format_name(entry: InventoryEntry) -> str:
    name = _format_model_name(entry.name)
    return f"{name}/{entry.version}" if entry.version else name


def _format_model_name(name: str) -> str:
    return format_path(Path(name))


def _get_precision(contract: Contract) -> str:
    return contract.quantization.precision if contract.quantization else "float32"


def _is_calibrated(contract: Contract) -> bool:
    return contract.temperature != 1


def _render_inventory(inventory: Inventory, root: Path) -> dict[str, Any]:
    return {
        "repository": format_path(root),
        "default_model": inventory.default_model and _format_model_name(inventory.default_model),
        "start_error": inventory.start_error and _make_printable(inventory.start_error),
        "models": [_render_entry(one) for one in inventory.entries],
    }


def _render_entry(entry: InventoryEntry) -> dict[str, Any]:
    contract = entry.contract
    return {
        "name": _format_model_name(entry.name),
        "version": entry.version,
        "path": format_path(entry.path) if entry.path else None,
        "bytes": entry.size,
        "labels": len(contract.labels) if contract else None,
        "height": contract.input.height if contract else None,
        "width": contract.input.width if contract else None,
        "task": contract.task if contract else None,
        "precision": _get_precision(contract) if contract else None,
        "accuracy": contract.accuracy.top1 if contract and contract.accuracy else None,
        "calibrated": _is_calibrated(contract) if contract else None,
        "served": entry.is_served,
        "reason": entry.reason and _make_printable(entry.reason),
        "source": _make_printable(entry.card.source) or None,
        "licence": _make_printable(entry.card.licence) or None,
    }


# --- one contract --------------------------------------------------------------------------------


def show_contract(contract: Contract, path: Path) -> None:
    """Print the facts of a contract, one per line, and the digest of its file.

    Raises `ModelError` when the file cannot be read any more.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    facts = (*_describe_contract(contract), *_describe_card(path), *_describe_file(path))
    for fact_name, fact in facts:
        console.print(f"{fact_name:<13}  {_make_printable(fact)}")


def _describe_contract(contract: Contract) -> Iterator[tuple[str, str]]:
    yield "model", f"{contract.name} version {contract.version} (contract format {contract.format})"
    yield "labels", _describe_labels(contract.labels)
    yield "task", f"{contract.task}: {_TASKS[contract.task]}"
    if contract.task is Task.BINARY:
        yield "threshold", f"{contract.thresholds[0]:g} for {contract.labels[1]}"
    elif contract.thresholds:
        yield "thresholds", f"from {min(contract.thresholds):g} to {max(contract.thresholds):g}"
    yield "input", f"{contract.input.height} x {contract.input.width} pixels (height x width), RGB"
    yield "geometry", format_steps(contract.input.steps)
    yield "pixels", _describe_pixel_path(contract.input)
    yield "normalisation", _describe_normalisation(contract)
    yield "calibration", _describe_calibration(contract)
    yield "accuracy", _describe_accuracy(contract)
    yield "precision", _describe_precision(contract.quantization)
    yield "layers", f"{len(contract.layers)}, {sum(one.parameters for one in contract.layers):,} parameters"
    yield "golden set", _describe_golden_set(contract)
    yield "drift", _describe_drift_reference(contract)
    yield "known", _describe_known(contract)
    yield "training", _describe_training(contract)
    yield "made by", contract.training.command or "not recorded"
    if contract.quantization:
        yield "converted by", contract.quantization.command


def _describe_card(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the source and licence of the model card beside the file."""
    card = read_model_card(path.parent)
    if card.source:
        yield "source", card.source
    if card.licence:
        yield "licence", card.licence


def _describe_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    yield "file", f"{format_path(path)}, {size / 1e6:.1f} MB"
    yield "sha256", digest


def _describe_labels(labels: Sequence[str]) -> str:
    more = len(labels) - _SHOWN_LABELS
    names = ", ".join(labels[:_SHOWN_LABELS])
    return f"{len(labels)}: {names}{f' and {more} more' if more > 0 else ''}"


def _describe_pixel_path(geometry: Geometry) -> str:
    if geometry.pixel_path is PixelPath.FAST and geometry.fast_obstacle:
        return f"fast, which is exact here: {geometry.fast_obstacle}"
    return _PIXEL_PATHS[geometry.pixel_path]


def _describe_normalisation(contract: Contract) -> str:
    """Return the operators in the graph between the pixels and the first layer with weights."""
    tensors = {contract.input_name}
    operators: list[str] = []
    for layer in contract.layers:
        if tensors & set(layer.inputs):
            if layer.kind not in _PIXEL_OPERATORS:
                break
            operators.append(layer.kind)
            tensors |= set(layer.outputs)
    steps = f" ({', '.join(operators)})" if operators else ""
    return f"inside the graph{steps}, which takes values from 0 to 255"


def _describe_calibration(contract: Contract) -> str:
    temperature = (
        f"temperature {contract.temperature:.4g}" if _is_calibrated(contract) else "none (temperature 1)"
    )
    if not contract.coverage:
        return f"{temperature}; no coverage sets"
    lowest, highest = contract.coverage[0].level, contract.coverage[-1].level
    levels = f"{100 * lowest:g}%" if lowest == highest else f"{100 * lowest:g}% to {100 * highest:g}%"
    return f"{temperature}; coverage sets for {_format_count(len(contract.coverage), 'level')}, {levels}"


def _describe_accuracy(contract: Contract) -> str:
    accuracy = contract.accuracy
    if accuracy is None:
        return "not measured"
    error = "" if accuracy.ece is None else f", calibration error {accuracy.ece:.2%}"
    return f"{accuracy.top1:.2%} of {_format_count(accuracy.images, 'image')}{error} ({accuracy.data})"


def _describe_precision(quantization: Quantization | None) -> str:
    if quantization is None:
        return "float32"
    speed = "" if quantization.speedup is None else f", {quantization.speedup:.2f} times as fast"
    return (
        f"{quantization.precision} with weights of {quantization.weight_bits} bits, converted from version "
        f"{quantization.source_version}; the same answer to {quantization.agreement:.2%} of "
        f"{_format_count(quantization.images, 'image')}{speed} ({quantization.processor})"
    )


def _describe_golden_set(contract: Contract) -> str:
    tolerances = ", ".join(f"{name} {value:g}" for name, value in contract.golden.logit_tolerance.items())
    return f"{_format_count(len(contract.golden.images), 'image')}; tolerance of the logits: {tolerances}"


def _describe_drift_reference(contract: Contract) -> str:
    if contract.reference is None:
        return "no reference: drift cannot be measured"
    return f"reference of {_format_count(contract.reference.images, 'image')}"


def _describe_known(contract: Contract) -> str:
    if contract.known is None:
        return "no score: answers do not tell whether an image is like the training images"
    return (
        f"score of at least {contract.known.threshold:.2f}, as of {contract.known.accepted:.0%} of "
        f"{_format_count(contract.known.images, 'held-out image')}"
    )


def _describe_training(contract: Contract) -> str:
    training = contract.training
    images = f", {_format_count(training.images, 'image')}" if training.images else ""
    # An import records the digest of the original file in place of a commit.
    is_digest = training.commit.startswith("sha256:")
    commit = f"{'' if is_digest else 'commit '}{training.commit}" if training.commit else ""
    return f"{training.data or 'not recorded'}{images}{commit and ', '}{commit}"


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
