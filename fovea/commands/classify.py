"""`fovea classify` and `fovea explain`: the service's answers without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fovea.service.errors import StartError


def classify(
    sources: Annotated[list[str], typer.Argument(help="Images, folders, patterns, ZIP and tar archives.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Table to write, with a row for each image: .parquet, .csv or .jsonl."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model; default: the default model of the repository.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Number of labels, most probable first; 0 for all.")] = 5,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Also show the set of labels that contains the true label this often, such as 0.95."
        ),
    ] = None,
    embedding: Annotated[
        bool,
        typer.Option("--embedding", help="Add the vector that the model's last layer reads; needs --json."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the JSON reply of the service.")] = False,
    where: Annotated[
        str | None,
        typer.Option(help="Write only rows that meet a condition, such as 'probability < 0.6'; needs --out."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that was writing --out when it was ended.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out if it exists, or begin an unfinished run anew.")
    ] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="`ray` classifies on all machines of a Ray cluster; needs --out and the extra ray."
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster, such as ray://head:10001; default: RAY_ADDRESS, or else a "
            "cluster of its own on this machine."
        ),
    ] = None,
) -> None:
    """Classify images without a server. Code and answers are those of the service."""
    from fovea.bulk.command import classify_to_table, classify_to_terminal

    settings: dict[str, Any] = {} if models is None else {"models": models}
    if address is not None and engine != "ray":
        raise StartError("--address needs --engine ray")
    if out is not None:
        if embedding or as_json:
            raise StartError(f"{'--json' if as_json else '--embedding'} is for the terminal, not for --out")
        classify_to_table(
            sources,
            out,
            model=model,
            top_k=top_k,
            coverage=coverage,
            resume=resume,
            force=force,
            where=where,
            engine=engine,
            address=address,
            **settings,
        )
        return
    for name, value in {
        "--where": where,
        "--resume": resume,
        "--force": force,
        "--engine ray": engine == "ray",
    }.items():
        if value:
            raise StartError(f"{name} needs --out")
    raise typer.Exit(
        classify_to_terminal(
            sources,
            model=model,
            top_k=top_k,
            coverage=coverage,
            embedding=embedding,
            as_json=as_json,
            **settings,
        )
    )


def explain(
    file: Annotated[Path, typer.Argument(help="Image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write: the image with its heat map.")],
    label: Annotated[
        str | None, typer.Option(help="Label to explain; default: the most probable label.")
    ] = None,
    method: Annotated[
        Literal["auto", "cam", "occlusion"],
        typer.Option(
            help="`cam` is exact but needs a suitable network; `occlusion` works for every network."
        ),
    ] = "auto",
    samples: Annotated[
        int,
        typer.Option(
            min=0, max=8000, help="Number of masked images for an occlusion; 0 for as many as time allows."
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed; the same seed and samples give the same map.")
    ] = 0,
    model: Annotated[
        str | None, typer.Option(help="Name of the model; default: the default model of the repository.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
) -> None:
    """Draw a heat map of the regions that a label depends on, as the service does."""
    from fovea.service.cli import explain_file

    settings = {} if models is None else {"models": models}
    explain_file(file, out, model=model, label=label, method=method, seed=seed, samples=samples, **settings)
