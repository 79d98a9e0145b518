"""Remove a version from a model's folder atomically: it disappears whole, or stays whole."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from fovea.service.artifact import repository
from fovea.service.artifact.repository import CONFIG_FILE, DEFAULT_MODEL_FILE
from fovea.service.errors import ModelError, to_one_line

_HIDDEN_PREFIX: Final = ".remove-"
"""Prefix of folders that are being deleted. The repository ignores hidden folders."""


def find_removable(root: Path, reference: str, *, may_be_last: bool) -> Path:
    """Return the folder of the version that `reference`, `<name>/<version>`, names.

    Raises `ModelError` when there is no such version, when the folder lies outside of the repository, when
    `config.toml` asks for the version, and when it is the model's only version, unless `may_be_last` is True.
    """
    if not root.is_dir():
        raise ModelError(f"{root} is one model file and not a repository; delete the file itself")
    name, separator, version = reference.rstrip("/").rpartition("/")
    if not separator or not version.isdecimal():
        raise ModelError(f"{reference!r} is not NAME/VERSION; give a version of a model, such as pets/1")
    if repository.has_versions_of_one_model(root):
        raise ModelError(f"{root} has the versions of one model and is no repository; delete a folder itself")
    # Only an entry of the repository is a name: `..` and paths are none.
    if name not in (names := repository.list_model_names(root)):
        raise ModelError(f"there is no model {name!r} in {root}; there are {', '.join(names) or 'none'}")
    folder = root / name
    if folder.is_symlink():
        raise ModelError(f"{folder} is a link to {folder.readlink()}; remove the version there, or the link")
    versions = repository.list_version_folders(folder)
    if version not in versions:
        raise ModelError(f"{name} has no version {version}; there are {', '.join(versions) or 'none'}")
    if version in (repository.read_config(folder).versions or ()):
        raise ModelError(f"{folder / CONFIG_FILE} asks for version {version}; change its versions first")
    if repository.list_available_versions(folder) == [version] and not may_be_last:
        raise ModelError(f"version {version} is the only version of {name}; add --all to remove the model")
    return folder / version


def remove_version(folder: Path) -> str | None:
    """Remove a version's folder, and the model's folder if nothing is left in it.

    The folder is first renamed to a hidden name, so that no reader sees half of a version. A link is removed,
    and its target is kept. Return a remark on what needs attention now, or None.

    Raises `ModelError` when the folder cannot be removed.
    """
    model_folder = folder.parent
    _delete_abandoned(model_folder)
    hidden_folder = model_folder / f"{_HIDDEN_PREFIX}{secrets.token_hex(8)}"
    try:
        folder.rename(hidden_folder)
    except OSError as error:
        raise ModelError(f"cannot remove {folder}: {error.strerror}") from None
    try:
        _delete(hidden_folder)
    except OSError as error:
        raise ModelError(
            f"{folder} is removed from the repository, but not all its files: {to_one_line(error)}; delete "
            f"{hidden_folder}"
        ) from None
    with suppress(OSError):  # the folder is not empty
        model_folder.rmdir()
    if not model_folder.is_dir() or not repository.list_available_versions(model_folder):
        root = model_folder.parent
        with suppress(ModelError):  # the service reports an unreadable file
            if repository.read_default_model(root) == model_folder.name:
                return f"{root / DEFAULT_MODEL_FILE} still names {model_folder.name}; write another name"
    return None


def _delete(path: Path) -> None:
    """Delete a folder, or a link without its target. Raises `OSError`."""
    while path.is_symlink() or path.exists():
        with suppress(FileNotFoundError):  # another call deletes the same folder as abandoned
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)


def _delete_abandoned(model_folder: Path) -> None:
    """Delete folders that interrupted calls have left."""
    for path in model_folder.glob(f"{_HIDDEN_PREFIX}*"):
        with suppress(OSError):  # it cannot be deleted
            _delete(path)
