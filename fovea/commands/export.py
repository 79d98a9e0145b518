"""`fovea export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fovea.model.data.dataset import Dataset
    from fovea.model.networks.checkpoint import Checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a finished `fovea train` run.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write: <repository>/<name>/<version>, such as zoo/pets/1.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Images for the verification; default: the training data.")
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the default model, for requests that name no model.")
    ] = False,
) -> None:
    """Export a checkpoint to one self-describing ONNX file, and verify it against the network."""
    from fovea.export.from_checkpoint import require_new_version
    from fovea.model.networks.checkpoint import load_checkpoint
    from fovea.model.run import reload_dataset
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    require_new_version(out)
    loaded_checkpoint = load_checkpoint(checkpoint)
    export_and_report(
        loaded_checkpoint, reload_dataset(loaded_checkpoint.metadata, data, checkpoint), out, default=default
    )


def export_and_report(checkpoint: Checkpoint, data: Dataset, out: Path, *, default: bool) -> None:
    """Export the checkpoint and print how closely the graph and the network agree."""
    from rich.console import Console

    from fovea.export.from_checkpoint import export_checkpoint
    from fovea.service.artifact.repository import MODEL_FILE

    report = export_checkpoint(checkpoint, data, out, default=default)
    console = Console(highlight=False, markup=False)
    for agreement in report.agreement:
        console.print(
            f"batch {agreement.batch:>2}: logits agree to {agreement.logits:.1e}, "
            f"probabilities to {agreement.probabilities:.1e}"
        )
    golden, accuracy = report.golden, report.accuracy
    console.print(f"golden set: {golden.images} images, logits to {golden.logit_difference:.1e}")
    console.print(
        f"accuracy {accuracy.top1:.2%} of {data.format_image_count(accuracy.images)} ({accuracy.data})"
    )
    console.print(f"wrote {out / MODEL_FILE}, {report.bytes / 1e6:.1f} MB", soft_wrap=True)
