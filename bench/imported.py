"""Networks with random weights, imported as users import theirs, in several arithmetics, built once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fovea.bench.workloads import CACHE

SIDE: Final = 224

LABEL_COUNT: Final = 1000

_CALIBRATION_IMAGES: Final = 8
"""Number of images that calibrate int8. With random weights only the speed counts."""


@dataclass(frozen=True)
class ImportedNetwork:
    """A network as its original file and as Fovea's model."""

    original_file: Path
    """Original file: a normalised tensor (batch, 3, side, side) to logits."""
    repository: Path
    """Model repository with the imported network, whose name is `network`."""

    @property
    def model_file(self) -> Path:
        """Model file of the imported network."""
        return self.repository / "network" / "1" / "model.onnx"


def import_network(
    name: str, arithmetic: str = "float32", *, side: int = SIDE, folder: Path = CACHE / "imported"
) -> ImportedNetwork:
    """Return a network of `fovea.model` in an arithmetic of `ARITHMETICS`, built if it is not in `folder`."""
    folder = folder / f"{name}-{side}-{arithmetic}"
    network = ImportedNetwork(folder / "plain.onnx", folder / "zoo")
    if not network.model_file.exists():
        from fovea.export.importer.inspect import ImportRequest  # not needed if everything exists
        from fovea.export.importer.pipeline import import_model
        from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
        from fovea.service.atomic_files import write_file

        ARITHMETICS[arithmetic](name, side, network.original_file)
        labels = folder / "labels.txt"
        write_file(labels, "".join(f"label {number}\n" for number in range(LABEL_COUNT)))
        preprocessing = PreprocessingOptions(preset=IMAGENET)
        import_model(
            ImportRequest(network.original_file, labels, "network", network.repository, preprocessing)
        )
    return network


def _export_float32(name: str, side: int, file: Path) -> None:
    _export_network(name, side, file, half=False)


def _export_float16(name: str, side: int, file: Path) -> None:
    _export_network(name, side, file, half=True)


def _export_network(name: str, side: int, file: Path, *, half: bool) -> None:
    """Write a network with random weights; with `half` all its weights and tensors are float16."""
    import torch

    from fovea.export.from_checkpoint import export_graph
    from fovea.model.networks.network import NETS, NetConfig
    from fovea.service.artifact.contract import Task
    from fovea.service.atomic_files import write_file

    torch.manual_seed(0)
    features = NETS[name](NetConfig(Task.MULTICLASS, LABEL_COUNT, name, side))
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    net = torch.nn.Sequential(features, pool, torch.nn.Linear(features.channels, LABEL_COUNT))
    example = torch.zeros(2, 3, side, side)
    if half:
        net, example = net.half(), example.half()
    write_file(file, export_graph(net, example, ["logits"]).SerializeToString())


def _export_int8(name: str, side: int, file: Path) -> None:
    float_file = file.with_name("float.onnx")
    _export_network(name, side, float_file, half=False)
    noise = np.random.default_rng(0).normal(0, 1, (_CALIBRATION_IMAGES, 3, side, side)).astype(np.float32)
    quantize_file(float_file, file, noise)


def quantize_file(
    float_file: Path, file: Path, images: npt.NDArray[Any], operators: Sequence[str] | None = None
) -> None:
    """Write a graph with one input, `pixels`, as QDQ: weights int8 per channel, activations uint8.

    `images`, an array (n, ...), calibrate it one by one. `operators` are the types of the nodes to quantize,
    by default all that ONNX Runtime can quantize.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared_file = file.with_name("prepared.onnx")
    quant_pre_process(float_file, prepared_file, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared_file,
        file,
        _CalibrationReader(images),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


class _CalibrationReader:
    """Calibration images in the form that ONNX Runtime asks for."""

    def __init__(self, images: npt.NDArray[Any]) -> None:
        self._images = iter(images)

    def get_next(self) -> Mapping[str, npt.NDArray[Any]] | None:
        """Return the next image as a batch of one, None at the end."""
        image = next(self._images, None)
        return None if image is None else {"pixels": image[None]}


ARITHMETICS: Final[Mapping[str, Callable[[str, int, Path], None]]] = {
    "float32": _export_float32,
    "float16": _export_float16,
    "int8": _export_int8,
}
"""Functions that write a network by name, side in pixels and file."""
