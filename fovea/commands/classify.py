"""`fovea classify` and `fovea explain`: the service's answers without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def classify(
    files: Annotated[list[Path], typer.Argument(help="Images of any served format, and folders of them.")],
    model: Annotated[str | None, typer.Option(help="Which model of the repository.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="How many labels, best first; 0 gives all.")] = 5,
    coverage: Annotated[
        float | None,
        typer.Option(help="Also the labels among which the true one is this often, such as 0.95."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write what the service would answer.")] = False,
) -> None:
    """Classify images here and now, without a server: the same code, the same answer."""
    from fovea.service.cli import classify_files

    settings = {} if models is None else {"models": models}
    raise typer.Exit(
        classify_files(files, model=model, top_k=top_k, coverage=coverage, as_json=as_json, **settings)
    )


def explain(
    file: Annotated[Path, typer.Argument(help="Image of any served format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write: the image under its heat map.")],
    label: Annotated[
        str | None, typer.Option(help="What speaks for this label; default the most probable.")
    ] = None,
    method: Annotated[
        Literal["auto", "cam", "occlusion"],
        typer.Option(help="`cam` is exact, where the network allows it; `occlusion` is for every network."),
    ] = "auto",
    samples: Annotated[
        int,
        typer.Option(min=0, max=8000, help="Masked images of an occlusion; 0: as many as there is time for."),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed and samples, same map.")] = 0,
    model: Annotated[str | None, typer.Option(help="Which model of the repository.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
) -> None:
    """Show what the model looked at: a heat map over the image, as the service makes it."""
    from fovea.service.cli import explain_file

    settings = {} if models is None else {"models": models}
    explain_file(file, out, model=model, label=label, method=method, seed=seed, samples=samples, **settings)
