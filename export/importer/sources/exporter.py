"""Export of a network of torch to ONNX in a converter, by whichever exporter can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fovea.export.importer.foreign_model import ImportRefused


def export_network(network: Any, height: int, width: int, file: Path) -> None:
    """Write a network from normalised values (n, 3, height, width) to logits as ONNX.

    The outputs are `logits` alone. Raises `ImportRefused`.
    """
    import torch

    network = network.eval()
    example = torch.zeros(2, 3, height, width)
    try:
        with torch.no_grad():  # an error of the network itself is clearer here than in the exporter
            network(example)
    except Exception as error:  # any library
        raise ImportRefused(
            f"the network does not run on images of {height} x {width} pixels: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    errors = []
    for count, options in _list_export_options():
        try:
            program = torch.onnx.export(
                network,
                (example[:count],),
                None if options["dynamo"] else str(file),
                input_names=["pixel_values"],
                output_names=["logits"],
                **options,
            )
            if program is not None:
                save_program(program, file)
            return
        except Exception as error:  # the exporters raise anything
            errors.append(" ".join(str(error).split())[:200])
    raise ImportRefused(f"torch cannot export the network to ONNX: {errors[0]}")


def save_program(program: Any, file: Path) -> None:
    """Write an exported program as ONNX, with its weights in a file beside it.

    Inside the file, torch would need two more copies of the weights in memory.
    """
    program.save(file, external_data=True)


def _list_export_options() -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield batch size and options of each exporter: any batch, one image, and the older exporter."""
    import torch

    yield 2, {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    yield 1, {"dynamo": True, "verbose": False}
    yield 1, {"dynamo": False, "dynamic_axes": {"pixel_values": {0: "batch"}}}
