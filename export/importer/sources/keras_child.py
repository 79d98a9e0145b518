"""Conversion of a `.keras` file to ONNX, with Keras on torch.

Runs as a process of its own: `python -m fovea.export.importer.sources.keras_child`.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.answers import write_outputs
from fovea.export.importer.sources.child import run_child

_ANY_SIDE: Final = 224
"""Side of an example for a model that takes images of any size, in pixels."""

_MIN_VERSION: Final = (3, 12)
"""Oldest version of Keras whose safe mode has no known gap (CVE-2025-1550, 8747, 9905, 9906, 12058)."""


def convert(action: str, file: str, *arguments: str) -> None:
    """Run `convert FILE OUT [HEIGHT WIDTH]` or `answer FILE INPUTS RESULT`."""
    if action == "convert":
        export_model(file, *arguments)
    else:
        answer_inputs(file, *arguments)


def load_model(file: str) -> Any:
    """Return a model without custom code. Raises `ImportRefused`."""
    os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported
    warnings.simplefilter("ignore")
    import keras

    version = tuple(int(one) for one in re.findall(r"\d+", keras.__version__)[:2])
    if version < _MIN_VERSION:
        raise ImportRefused(
            f"keras {keras.__version__} can run code that a file brings along; install keras "
            f"{'.'.join(map(str, _MIN_VERSION))} or newer: pip install --upgrade keras"
        )
    try:
        return keras.saving.load_model(file, compile=False, safe_mode=True)
    except (TypeError, ValueError, OSError, KeyError) as error:
        message = " ".join(str(error).split())
        raise ImportRefused(
            f"keras {keras.__version__} cannot load {Path(file).name}: {message[:300]}"
        ) from None


def export_model(file: str, out: str, *size: str) -> None:
    """Convert a model, for images of `size` if it is given. Raises `ImportRefused`."""
    model = load_model(file)
    import keras

    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ImportRefused(
            f"the model has {len(model.inputs)} inputs and {len(model.outputs)} outputs; an image classifier "
            "has one of each"
        )
    sides = [int(one) for one in size] or model.inputs[0].shape[1:3]
    shape = [side or _ANY_SIDE for side in (*sides, *model.inputs[0].shape[1 + len(sides) :])]
    model(keras.ops.zeros((1, *shape)))  # Keras exports only a model that has been called
    signature = [keras.InputSpec(shape=(None, *shape), dtype=model.inputs[0].dtype)] if size else None
    model.export(out, format="onnx", verbose=False, input_signature=signature)


def answer_inputs(file: str, inputs_file: str, result: str) -> None:
    """Write the outputs of the model for inputs (n, H, W, channels)."""
    model = load_model(file)
    import keras

    name = f"the network in Keras {keras.__version__} on torch"
    write_outputs(inputs_file, result, name, lambda one: model.predict(one, verbose=0))


if __name__ == "__main__":
    run_child(convert)
