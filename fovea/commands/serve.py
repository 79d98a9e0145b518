"""`fovea serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from fovea.service.errors import SettingsError


def serve(
    path: Annotated[
        str | None, typer.Argument(help="Model repository, model file or URI of a store; same as --models.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [FOVEA_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [FOVEA_PORT].")] = None,
    models: Annotated[
        str | None, typer.Option(help="Model repository, model file or URI of a store [FOVEA_MODELS].")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes that share the port and the processors [FOVEA_WORKERS]."),
    ] = None,
) -> None:
    """Serve the models in the repository over HTTP. All other settings are FOVEA_* variables."""
    from fovea.service.__main__ import main

    if path is not None and models is not None and path != models:
        raise SettingsError(f"{path} and --models {models} are different repositories; give only one of them")
    settings = {"host": host, "port": port, "models": path or models, "workers": workers}
    raise typer.Exit(main(**{name: value for name, value in settings.items() if value is not None}))
