"""`fovea publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def publish(
    model: Annotated[Path, typer.Argument(help="A model file.")],
    models: Annotated[Path | None, typer.Option(help="Model repository [FOVEA_MODELS].")] = None,
    name: Annotated[str | None, typer.Option(help="What it is called; default what it says itself.")] = None,
) -> None:
    """Put a model into a repository, as its latest version: a service that watches it tries and serves it."""
    from fovea.service.rollout.publish import publish_model
    from fovea.service.settings import load_settings

    settings = load_settings(**({} if models is None else {"models": models}))
    print(f"published {publish_model(model, settings.models, name)}")
