"""The models that are part of an installation, for a service that is given no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import fovea

DEFAULT_FOLDER: Final = Path("zoo")
"""Repository in the current folder, which takes precedence."""

PACKAGED_MODELS: Final = Path(fovea.__path__[0]) / "default_models"
"""Repository with the default model: package data of the wheel, and a link to `zoo` in a checkout."""


def find_packaged_models() -> dict[str, Any]:
    """Return the setting `models` for a current folder without a repository; empty if it has one."""
    if DEFAULT_FOLDER.exists() or not PACKAGED_MODELS.is_dir():
        return {}
    return {"models": PACKAGED_MODELS}


def is_packaged(models: Path) -> bool:
    """Return whether a repository is that of the installation, which an upgrade replaces."""
    return models.absolute() == PACKAGED_MODELS.absolute()
