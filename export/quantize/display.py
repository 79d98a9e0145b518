"""The quantization report on the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from fovea.export.quantize.gate import describe_loss
from fovea.export.quantize.pipeline import Proof, QuantizeReport
from fovea.service.artifact.contract import Precision
from fovea.service.artifact.repository import MODEL_FILE


def show_report(report: QuantizeReport, version_folder: Path) -> None:
    """Print how the candidate that was written compares with the float model, and how sure that is."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    quantization = report.quantization
    loss = describe_loss(
        report.proof.counts, quantization.candidates, is_labelled=quantization.top1 is not None
    )
    console.print(f"accuracy  {loss}")
    console.print(f"proof     {_describe_proof(report.proof)}")
    if report.source_ms and report.ms and quantization.speedup:
        console.print(
            f"speed     {report.source_ms:.2f} → {report.ms:.2f} ms an image in one thread, "
            f"{quantization.speedup:.2f} times as fast ({quantization.processor})"
        )
    elif quantization.precision is Precision.FLOAT16:
        console.print("speed     not measured: float16 is for CUDA, and this host has none")
    else:
        console.print("speed     not measured: --min-speedup is 0")
    console.print(
        f"golden    logits to {report.golden.logit_difference:.1e}; another host may differ by "
        f"{report.golden_tolerance:.2g}"
    )
    for note in report.notes:
        console.print(f"note      {note}")
    if report.unreadable:
        console.print(f"note      {len(report.unreadable)} files cannot be read, and were left out")
    console.print(
        f"wrote {version_folder / MODEL_FILE}, {report.bytes / 1e6:.1f} MB "
        f"(version {report.source_version} has {report.source_bytes / 1e6:.1f} MB)"
    )
    console.print(f"next: fovea serve {shlex.quote(str(version_folder.parent.parent))}")


def _describe_proof(proof: Proof) -> str:
    text = f"a loss of at most {100 * proof.max_loss:g} points is {100 * proof.certainty:.1f} % sure"
    if proof.images_for_proof is None:
        return f"{text}; the loss is at the limit, so no number of images would prove it"
    if proof.images_for_proof <= proof.counts.images:
        return f"{text}; {proof.images_for_proof} images were enough to prove it"
    return f"{text}; with shares like these it would take {proof.images_for_proof} images to prove it"
