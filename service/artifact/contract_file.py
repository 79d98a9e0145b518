"""Read the contract of a model file without loading the model, for commands that list and describe models."""

from __future__ import annotations

import stat
from pathlib import Path

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.onnx_edit import read_metadata
from fovea.service.errors import ModelError, to_one_line


def read_contract(path: Path) -> Contract:
    """Return the contract in a model file. The weights are not read, and the graph is not checked.

    Raises `ModelError` when the file cannot be read, and `ContractError` when its contract is not valid.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ModelError(f"{path.name} is not a file")
        with path.open("rb") as file:
            metadata = read_metadata(file)
    except OSError as error:
        raise ModelError(f"the file cannot be read: {error.strerror or to_one_line(error)}") from None
    return Contract.from_metadata(metadata)
