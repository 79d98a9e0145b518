"""`fovea classify` and `fovea explain`: the service's answers without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fovea.service.errors import StartError


def classify(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, patterns, archives, tables, URIs; - for a list on standard input."
        ),
    ],
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
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="Classify this region instead of the whole image: left,top,right,bottom in pixels; repeat "
            "the option for several regions."
        ),
    ] = None,
    boxes: Annotated[
        str | None, typer.Option(help="Regions as JSON, such as '[[0, 0, 100, 100]]'; further to --box.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the JSON reply of the service.")] = False,
    column: Annotated[
        str | None,
        typer.Option(help="Column of a CSV or Parquet table with the images; default: found by its name."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host of https URLs that may be read, such as photos.example.com; may be repeated."
        ),
    ] = None,
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
    labels_from: Annotated[
        Literal["folders"] | None,
        typer.Option(
            help="Compare with the true labels, which are the names of the folders that hold the images."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="HTML file for the report of --labels-from; default: report.html beside --out."),
    ] = None,
    copy_to: Annotated[
        Path | None, typer.Option(help="Copy each image into a folder of its label below this folder.")
    ] = None,
    move_to: Annotated[
        Path | None, typer.Option(help="Move each image into a folder of its label below this folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what --copy-to or --move-to would do; touch no image.")
    ] = False,
) -> None:
    """Classify images without a server. Code and answers are those of the service."""
    from fovea.bulk.command import classify_to_table, classify_to_terminal
    from fovea.bulk.table_tasks import TaskOptions
    from fovea.commands.box_options import read_boxes

    settings: dict[str, Any] = {} if models is None else {"models": models}
    tasks = TaskOptions(labels_from, report, copy_to, move_to, dry_run)
    if address is not None and engine != "ray":
        raise StartError("--address needs --engine ray")
    if out is not None:
        for name, value in {
            "--json": as_json,
            "--embedding": embedding,
            "--box": box,
            "--boxes": boxes,
        }.items():
            if value:
                raise StartError(f"{name} is for the terminal, not for --out")
        code = classify_to_table(
            sources,
            out,
            model=model,
            top_k=top_k,
            coverage=coverage,
            column=column,
            allowed_hosts=allow_host or (),
            resume=resume,
            force=force,
            where=where,
            engine=engine,
            address=address,
            tasks=tasks,
            **settings,
        )
        raise typer.Exit(code)
    tasks.check(None, may_replace=False)
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
            boxes=read_boxes(box, boxes),
            as_json=as_json,
            column=column,
            allowed_hosts=allow_host or (),
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
