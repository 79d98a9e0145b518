"""The answers of a source's own pipeline, as a converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fovea.export.importer.foreign_model import Array
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import NetworkAnswers, ReferenceAnswers, ReferenceNetwork


def read_answers(file: Path) -> ReferenceAnswers:
    """Read the file that a converter has written for `answer`."""
    with np.load(file, allow_pickle=False) as arrays:
        return ReferenceAnswers(
            name=json.loads(str(arrays["name"])), values=arrays["values"], outputs=arrays.get("outputs")
        )


def create_network(
    child: str, arguments: tuple[str | Path, ...], origin: str, work: Path
) -> ReferenceNetwork:
    """Return the network that the converter `child` runs for `answer` and the arguments.

    The converter gets the file of the inputs and that of the result as its last arguments.
    """
    return ReferenceNetwork(partial(_run_network, child, arguments, origin, work))


def _run_network(
    child: str, arguments: tuple[str | Path, ...], origin: str, work: Path, inputs: Array
) -> NetworkAnswers:
    inputs_file, result = work / "inputs.npy", work / "outputs.npz"
    np.save(inputs_file, inputs)
    run_converter(
        child, ["answer", *arguments, inputs_file, result], what=f"images by the network of {origin}"
    )
    with np.load(result, allow_pickle=False) as arrays:
        return NetworkAnswers(json.loads(str(arrays["name"])), arrays["outputs"])


def write_outputs(inputs_file: str, result: str, name: str, run: Callable[[Array], Any]) -> None:
    """Run a network on each image of a file of inputs alone, and write its outputs.

    Each image is a batch of its own, because some files fix the batch.
    """
    outputs = [np.asarray(run(one[None])).reshape(1, -1) for one in np.load(inputs_file, allow_pickle=False)]
    np.savez(result, name=np.array(json.dumps(name)), outputs=np.concatenate(outputs))
