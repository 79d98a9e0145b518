"""`fovea remove`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def remove(
    model: Annotated[str, typer.Argument(help="NAME/VERSION in the repository, such as pets/1.")],
    models: Annotated[Path | None, typer.Option(help="Model repository [FOVEA_MODELS].")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    last: Annotated[
        bool, typer.Option("--all", help="Remove the only version of a model too, and with it the model.")
    ] = False,
) -> None:
    """Remove one version from a repository. A running service unloads the version by itself."""
    from fovea.commands.repository import choose_repository
    from fovea.service.artifact.removed_version import find_removable, remove_version
    from fovea.service.errors import StartError
    from fovea.service.model_display import format_path

    folder = find_removable(choose_repository(models).models, model, may_be_last=last)
    if not yes:
        if not sys.stdin.isatty():
            raise StartError(f"{format_path(folder)} is not removed without a question; add --yes")
        if not typer.confirm(f"Remove {format_path(folder)} for good?", err=True):
            print("nothing was removed")
            raise typer.Exit(1)
    note = remove_version(folder)
    print(f"removed {format_path(folder)}; a running service unloads this version by itself")
    if note:
        print(f"note: {note}")
