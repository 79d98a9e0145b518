"""The `make bench-import` benchmark: the memory of `fovea import` of a ViT-B with random weights.

The network is imported from each kind of source that this installation can read: an ONNX file, a program of
`torch.export` and, if transformers is installed, safetensors. The memory is the largest sum of resident
memory of the command and its converters, which counts shared libraries once per process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fovea.bench.mixed import describe_machine
from fovea.bench.processes import find_process_tree
from fovea.bench.workloads import BenchError

MAX_RATIO: Final = 3.0
"""Maximum memory of an import, as a multiple of the size of the file."""

_SIDE: Final = 224

_LABEL_COUNT: Final = 1000

_POLL_SECONDS: Final = 0.01
"""Interval at which memory is read; loading a file of 350 MB takes a second."""


@dataclass(frozen=True)
class ImportMemory:
    """The memory of one import."""

    source: str
    file_bytes: int
    """Size of the file with the weights."""
    peak_bytes: int
    """Largest resident memory of all processes of the import together."""
    seconds: float

    @property
    def ratio(self) -> float:
        """Memory as a multiple of the size of the file."""
        return self.peak_bytes / self.file_bytes

    def __str__(self) -> str:
        return (
            f"{self.source:<12} {self.file_bytes / 1e6:5.0f} MB, peak {self.peak_bytes / 1e6:5.0f} MB, "
            f"{self.ratio:.2f} times the file, {self.seconds:.0f} s"
        )


def measure_peak(command: Sequence[str | Path], folder: Path | None = None) -> tuple[int, float]:
    """Run a command in a folder. Return the peak of its tree's resident memory in bytes, and the seconds.

    Raises `BenchError` if the command fails.
    """
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(_read_resident_bytes, find_process_tree(process.pid))))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            raise BenchError(
                f"{' '.join(map(str, command))}: {output.read().decode(errors='replace')[-500:]}"
            )
    return peak, time.monotonic() - start


def _read_resident_bytes(process_id: int) -> int:
    """Return the resident memory of a process in bytes; 0 if it has ended."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def measure_import(
    name: str, source: Path, weights: Path, folder: Path, options: Sequence[str]
) -> ImportMemory:
    """Import a source whose weights are in the file `weights` into a new repository in `folder`."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "fovea",
        "import",
        source,
        "--name",
        "network",
        "--out",
        folder / "zoo",
    ]
    peak, seconds = measure_peak([*command, *options])
    return ImportMemory(name, weights.stat().st_size, peak, seconds)


# --- the network ---------------------------------------------------------------------------------


def build_transformer(layers: int = 12, width: int = 768) -> Any:
    """Return a vision transformer with random weights, by default a ViT-B/16 with 86 million of them."""
    import torch
    from torch import nn

    class VisionTransformer(nn.Module):
        """Patches of 16 pixels, a class token, encoder layers and a linear head."""

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 16, 16)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.randn(1, (_SIDE // 16) ** 2 + 1, width) * 0.02)
            heads = max(1, width // 64)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _LABEL_COUNT)

        def forward(self, images: Any) -> Any:
            """Return the logits (n, labels) of images (n, 3, H, W)."""
            tokens = self.patches(images).flatten(2).transpose(1, 2)  # (n, patches, width)
            tokens = torch.cat([self.token.expand(images.shape[0], -1, -1), tokens], 1) + self.positions
            for layer in self.layers:
                tokens = layer(tokens)
            return self.head(self.norm(tokens[:, 0]))

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no form in ONNX
    return VisionTransformer().eval()


def write_onnx(network: Any, file: Path) -> None:
    """Write a network from images (n, 3, 224, 224) as one ONNX file."""
    import torch

    from fovea.export.from_checkpoint import export_graph

    file.write_bytes(export_graph(network, torch.zeros(2, 3, _SIDE, _SIDE), ["logits"]).SerializeToString())


def write_program(network: Any, file: Path) -> None:
    """Write a network from images (n, 3, 224, 224) as a program of `torch.export`."""
    import torch

    batch = {0: torch.export.Dim("batch")}
    torch.export.save(
        torch.export.export(network, (torch.zeros(2, 3, _SIDE, _SIDE),), dynamic_shapes=(batch,)), file
    )


def write_labels(file: Path) -> None:
    """Write one label for each output of the network."""
    file.write_text("".join(f"label {number}\n" for number in range(_LABEL_COUNT)))


def _write_safetensors(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = {number: f"label {number}" for number in range(_LABEL_COUNT)}
    config = ViTConfig(id2label=names, label2id={name: number for number, name in names.items()})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def _run_apart(write: Callable[[Path], None], target: Path) -> None:
    """Write a network in a process of its own, whose memory is not that of this one."""
    process_id = os.fork()
    if not process_id:
        code = 1
        try:
            write(target)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(process_id, 0)[1]:
        raise BenchError(f"cannot write {target}")


def measure_sources(folder: Path) -> list[ImportMemory]:
    """Import the network from each kind of source, printing each result."""
    labels = folder / "labels.txt"
    write_labels(labels)
    options = ["--labels", str(labels), "--preset", "inception"]
    results = []
    for name, file_name, write in (("ONNX", "vit.onnx", write_onnx), (".pt2", "vit.pt2", write_program)):
        file = folder / file_name
        _run_apart(lambda target, write=write: write(build_transformer(), target), file)  # type: ignore[misc]
        results.append(measure_import(name, file, file, folder / name, options))
        print(results[-1], flush=True)
        file.unlink()
    if importlib.util.find_spec("transformers"):
        repository = folder / "vit"
        _run_apart(_write_safetensors, repository)
        weights = repository / "model.safetensors"
        results.append(measure_import("safetensors", repository, weights, folder / "safetensors", []))
        print(results[-1], flush=True)
    else:
        print("safetensors  not measured: pip install transformers")
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and exit with 1 if an import needs more than `MAX_RATIO` times its file."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.import_memory", description=__doc__)
    parser.parse_args(arguments)
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as folder:
        results = measure_sources(Path(folder))
    if any(one.ratio > MAX_RATIO for one in results):
        sys.exit(f"an import needs more than {MAX_RATIO:g} times its file")


if __name__ == "__main__":
    main()
