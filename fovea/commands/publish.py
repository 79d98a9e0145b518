"""`fovea publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def publish(
    model: Annotated[Path, typer.Argument(help="Model file, such as model.onnx.")],
    models: Annotated[Path | None, typer.Option(help="Model repository [FOVEA_MODELS].")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the name in the file.")
    ] = None,
) -> None:
    """Add a model to a repository as its latest version. A running service tests it, then serves it."""
    from fovea.commands.repository import choose_repository
    from fovea.service.rollout.publish import publish_model

    settings = choose_repository(models)
    print(f"published {publish_model(model, settings.models, name, single_name=settings.model_name)}")
