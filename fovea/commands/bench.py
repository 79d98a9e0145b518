"""`fovea bench` and `fovea doctor`: measurements of a service under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    url: Annotated[str, typer.Argument(help="URL of a running service, such as http://127.0.0.1:8000.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Images to send; default: generated images of 512 x 384 pixels."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=100_000, help="Requests per second, independent of the replies (open loop)."
        ),
    ] = None,
    callers: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="Number of callers with one request at a time each, without --rate."
        ),
    ] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Duration in seconds.")] = 10.0,
    key: Annotated[
        str | None,
        typer.Option(
            help="API key of the service [FOVEA_KEY]; better in the variable, which others cannot see."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Load a running service and measure its speed. With --rate, latencies are those that users see."""
    import os

    from fovea.bench.command import run_bench
    from fovea.http_calls import KEY_VARIABLE

    if key is not None:
        os.environ[KEY_VARIABLE] = key
    raise typer.Exit(
        run_bench(url, images or [], rate=rate, callers=callers, seconds=seconds, as_json=as_json)
    )


def doctor(
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Duration of the load in seconds.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Start the service with the settings of the environment, load it, and report what limits it."""
    from fovea.bench.doctor import run_doctor

    raise typer.Exit(run_doctor(seconds=seconds, as_json=as_json))
