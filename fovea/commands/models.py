"""`fovea models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models(
    folder: Annotated[
        Path | None, typer.Argument(help="Model repository or one model file [FOVEA_MODELS].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List every version in a repository, and which of them a start would serve. Nothing is loaded."""
    from fovea.service.model_display import show_inventory
    from fovea.service.rollout.inventory import take_inventory
    from fovea.service.settings import load_settings

    settings = load_settings(**({} if folder is None else {"models": folder}))
    show_inventory(take_inventory(settings), settings.models, as_json=as_json)
