"""The repository that a command changes."""

from __future__ import annotations

from pathlib import Path


def choose_repository(models: Path | None) -> Path:
    """Return `models`, or the repository of the settings.

    Raises `SettingsError` if that is a store, which only its own tools change, or the repository of the
    installation, which the next upgrade replaces.
    """
    from fovea.service.errors import SettingsError
    from fovea.service.packaged_models import DEFAULT_FOLDER, is_packaged
    from fovea.service.settings import load_settings

    settings = load_settings(**({} if models is None else {"models": models}))
    settings.require_folder()
    repository = settings.models
    if models is None and is_packaged(repository):
        raise SettingsError(
            f"there is no folder {DEFAULT_FOLDER} here, and the models of the installation are not changed; "
            "make one, or name another repository (--models)"
        )
    return repository
