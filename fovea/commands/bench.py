"""`fovea bench` and `fovea doctor`: measurements of a service under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    url: Annotated[str, typer.Argument(help="Of a running service, such as http://127.0.0.1:8000.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="What is sent; default pictures of 512 x 384."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, max=100_000, help="Requests a second, whether or not others are answered."),
    ] = None,
    callers: Annotated[
        int, typer.Option(min=1, max=4096, help="Without --rate: how many, each with one request at a time.")
    ] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="For how long.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Load a running service, and say how fast it answers. With --rate latencies are what users would see."""
    from fovea.bench.command import run_bench

    raise typer.Exit(
        run_bench(url, images or [], rate=rate, callers=callers, seconds=seconds, as_json=as_json)
    )


def doctor(
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Length of the self-load.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write what was found as JSON.")] = False,
) -> None:
    """Start the service with the settings of the environment, load it, and say what keeps it from more."""
    from fovea.bench.doctor import run_doctor

    raise typer.Exit(run_doctor(seconds=seconds, as_json=as_json))
