"""Conversion of TorchScript and of programs of torch.export to ONNX, without unpickling any object.

Runs as a process of its own: `python -m fovea.export.importer.sources.torch_child`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import Array, ImportRefused
from fovea.export.importer.sources.answers import write_outputs
from fovea.export.importer.sources.child import run_child
from fovea.export.importer.sources.exporter import save_program
from fovea.export.importer.sources.torch_code import check_program_records, check_script, restrict_json

_ANY_SIDE: Final = 224
"""Side of the example for a graph that takes images of any size, in pixels."""


def convert(action: str, *arguments: str) -> None:
    """Run `KIND FILE HEIGHT WIDTH OUT` or `answer KIND FILE INPUTS RESULT`, for a kind `script` or `program`.

    TorchScript is converted for images of `height` x `width` pixels; 0 for any size.
    """
    warnings.simplefilter("ignore")
    if action == "answer":
        kind, file, inputs_file, result = arguments
        answer_inputs(kind, Path(file), inputs_file, result)
        return
    file, height, width, out = arguments
    if action == "script":
        export_script(Path(file), int(height), int(width), Path(out))
    else:
        export_program(Path(file), Path(out))


def load_script(file: Path) -> Any:
    """Return TorchScript, whose own reader makes no Python objects."""
    import torch

    try:
        check_script(file)
        return torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except ImportRefused as error:
        raise ImportRefused(f"{file.name} {error}") from None
    except RuntimeError as error:
        raise ImportRefused(f"torch cannot read {file.name}: {_shorten(error)}") from None


def export_script(file: Path, height: int, width: int, out: Path) -> None:
    """Convert TorchScript."""
    import torch

    module = load_script(file)
    has_size = height > 0
    example = torch.zeros(1, 3, height, width) if has_size else torch.zeros(1, 3, _ANY_SIDE, _ANY_SIDE)
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:  # TorchScript raises anything
        raise ImportRefused(
            f"{file.name} does not run on an image of {' x '.join(map(str, example.shape[1:]))}: "
            f"{_shorten(error)}; set the size with --crop"
        ) from None
    torch.onnx.export(
        module,
        (example,),
        str(out),
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"} if has_size else {0: "batch", 2: "height", 3: "width"}},
        dynamo=False,
    )


def load_program(file: Path) -> Any:
    """Return a program of torch.export, of which only tensors and plain values are unpickled."""
    import torch

    try:
        check_program_records(file)
        with restrict_pickles(), restrict_json():
            return torch.export.load(file)
    except ImportRefused as error:
        raise ImportRefused(f"{file.name} {error}") from None
    except Exception as error:  # torch.export raises anything
        raise ImportRefused(f"torch {torch.__version__} cannot read {file.name}: {_shorten(error)}") from None


def export_program(file: Path, out: Path) -> None:
    """Convert a program of torch.export."""
    import torch

    program = load_program(file)
    onnx_program = torch.onnx.export(program, verbose=False)
    if onnx_program is None:
        raise ImportRefused(f"torch exported nothing from {file.name}")
    save_program(onnx_program, out)


def answer_inputs(kind: str, file: Path, inputs_file: str, result: str) -> None:
    """Write the outputs of a file of `kind`, `script` or `program`, for inputs (n, channels, H, W)."""
    import torch

    module = load_script(file) if kind == "script" else load_program(file).module()

    def run(one: Array) -> Array:
        with torch.no_grad():
            outputs = module(torch.from_numpy(one))
        if not isinstance(outputs, torch.Tensor):
            raise ImportRefused(f"{file.name} has several outputs, and it is unknown which to compare")
        return outputs.float().numpy()

    write_outputs(inputs_file, result, f"the network in torch {torch.__version__}", run)


@contextmanager
def restrict_pickles() -> Iterator[None]:
    """Let `torch.load` read tensors and plain values only, and let `pickle` read nothing.

    `torch.export.load` asks for `weights_only=False`, and unpickles constants itself. The restriction is in
    place of a check of the archive beforehand, which could overlook a file that torch finds.
    """
    import torch

    load = torch.load
    originals = {name: getattr(pickle, name) for name in ("load", "loads", "Unpickler")}

    def load_weights(*arguments: Any, **options: Any) -> Any:
        try:
            return load(*arguments, **{**options, "weights_only": True})
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError and others
            raise ImportRefused(_describe_pickle(error)) from None

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise ImportRefused(_describe_pickle("an object of Python"))

    class Unpickler(pickle.Unpickler):
        """An unpickler without classes; a class, because other code derives from it."""

        def find_class(self, module_name: str, global_name: str, /) -> Any:
            """Raise `ImportRefused`."""
            raise ImportRefused(_describe_pickle(f"{module_name}.{global_name}"))

    torch.load = load_weights
    for name, replacement in {"load": refuse, "loads": refuse, "Unpickler": Unpickler}.items():
        setattr(pickle, name, replacement)
    try:
        yield
    finally:
        torch.load = load
        for name, original in originals.items():
            setattr(pickle, name, original)


def _describe_pickle(reason: Any) -> str:
    return (
        f"has a pickle that does not load with weights_only=True ({_shorten(reason)}) and might run any "
        "program; export the model to ONNX instead"
    )


def _shorten(error: Any) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    run_child(convert)
