"""The repository that a command changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fovea.service.settings import Settings


def choose_repository(models: Path | None) -> Settings:
    """Return the settings with the repository `models`, or else their own.

    Raises `SettingsError` if the repository is a store, which only its own tools change, or that of the
    installation, which the next upgrade replaces.
    """
    from fovea.service.errors import SettingsError
    from fovea.service.packaged_models import DEFAULT_FOLDER, is_packaged
    from fovea.service.settings import load_settings

    settings = load_settings(**({} if models is None else {"models": models}))
    settings.require_folder()
    if models is None and is_packaged(settings.models):
        raise SettingsError(
            f"there is no folder {DEFAULT_FOLDER} here, and the models of the installation are not changed; "
            "make one, or name another repository (--models)"
        )
    return settings
