"""The model file that a source names: a folder, a repository, a file, or a model on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from fovea.hub_models import HUB_PREFIX, find_hub_model
from fovea.service.artifact.repository import (
    MODEL_FILE,
    ModelVersion,
    find_versions,
    list_available_versions,
    read_config,
    scan_repository,
)
from fovea.service.errors import ModelError

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.]+):")
"""Pattern of a source that is not a path, such as `hf:`. A single letter is a drive."""


def find_model(
    source: str | os.PathLike[str],
    version: str | None = None,
    identity: tuple[str | None, str | None] | None = None,
) -> ModelVersion:
    """Return the model version that a source names. Raises `ModelError`.

    `version` overrides the version that would be served. `identity` is the name and version of the model in a
    single file, if the file's own contract does not decide.
    """
    path = Path(os.path.abspath(Path(source).expanduser()))  # noqa: PTH100 - keeps links: they name models
    if not path.exists() and str(source).startswith(HUB_PREFIX):
        path = find_hub_model(str(source))
    if not path.exists():
        _check_scheme(str(source))
        raise ModelError(
            f"there is no file or folder {os.fspath(source)}; give a model folder such as zoo/pets, a "
            "repository, or an ONNX file"
        )
    if identity:
        return ModelVersion.from_path(
            path, *identity, read_config(path.parent.parent) if identity[0] else None
        )
    if path.is_file():
        return _check_version(ModelVersion.from_path(path, None, None), version)
    if (path / MODEL_FILE).is_file():
        return _check_version(_find_in_version_folder(path), version)
    if list_available_versions(path):
        return find_versions(path.parent, path.name, version)[-1]
    return _find_in_repository(path, version)


def _check_scheme(source: str) -> None:
    """Raise `ModelError` for a source of `fovea import` that `load` does not fetch."""
    if scheme := _SCHEME.match(source):
        raise ModelError(
            f"fovea.load reads folders, files and hf: sources, not {scheme[1]}:; import the model with "
            "`fovea import`, and load the result"
        )


def _find_in_version_folder(folder: Path) -> ModelVersion:
    """Return the model in a folder such as `zoo/pets/3`. The folders name it if they are a repository's."""
    if not folder.name.isdecimal():
        return ModelVersion.from_path(folder / MODEL_FILE, None, None)
    return find_versions(folder.parent.parent, folder.parent.name, folder.name)[-1]


def _find_in_repository(root: Path, version: str | None) -> ModelVersion:
    """Return the default model of a repository, or its only model."""
    state = scan_repository(root)
    name = state.default_model
    if name is None:
        names = sorted(filter(None, state.versions_by_model))
        raise ModelError(
            f"{root} has {len(names)} models and no default: {', '.join(names)}; load one of them, such as "
            f"{root / names[0]}"
        )
    return find_versions(root, name, version)[-1]


def _check_version(found: ModelVersion, version: str | None) -> ModelVersion:
    """Return the model if `version` does not ask for another one. Raises `ModelError`."""
    if version is not None and version != found.version:
        raise ModelError(f"{found.path} is one file; load the model's folder to choose version {version}")
    return found
