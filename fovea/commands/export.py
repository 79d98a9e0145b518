"""`fovea export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fovea.model.data.dataset import Dataset
    from fovea.model.networks.checkpoint import Checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `fovea train` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to: <repository>/<name>/<version>, such as zoo/pets/1.")],
    data: Annotated[
        Path | None, typer.Option(help="Images to verify on; default what it was trained on.")
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the model that answers where a request names none.")
    ] = False,
) -> None:
    """Turn a checkpoint into one ONNX file that describes itself, and prove that it computes the same."""
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
    """Export, and say how close graph and network are."""
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
