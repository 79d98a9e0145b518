"""Every version in a repository, its contract, and whether a start would serve it.

Nothing is loaded: a start may still refuse a version whose contract is valid, because its graph is broken or
because its trial fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fovea.service.artifact import repository
from fovea.service.artifact.contract import Contract
from fovea.service.artifact.contract_file import read_contract
from fovea.service.artifact.model_card import ModelCard, read_model_card
from fovea.service.artifact.repository import MODEL_FILE, ModelVersion, ServingState
from fovea.service.errors import ModelError, to_one_line
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.startup import choose_serving_state
from fovea.service.settings import Settings


@dataclass(frozen=True)
class InventoryEntry:
    """One version in the repository, or a model or version that the repository lacks but asks for."""

    name: str
    version: str
    """Version by the folder; empty for a problem with the whole model."""
    path: Path | None
    """Path of the model file; None if there is no file."""
    size: int | None
    """Size of the model file in bytes; None if it cannot be read."""
    contract: Contract | None
    """None if the contract cannot be read."""
    is_served: bool
    """True if a start would serve this version."""
    reason: str | None
    """Reason why the version cannot be served; None for a version that is served, or that is only older."""
    card: ModelCard = field(default_factory=ModelCard)
    """Origin by the model card beside the file; empty without a card."""


class Inventory(NamedTuple):
    """All versions in a repository."""

    entries: tuple[InventoryEntry, ...]
    """Entries by name, the lowest version first."""
    default_model: str | None
    start_error: str | None
    """Reason why a start would end with an error; None if it would not."""


def take_inventory(settings: Settings) -> Inventory:
    """Return every version in the repository of the settings. A broken file is an entry with a reason.

    Raises `ModelError` when the repository cannot be read.
    """
    entries = list(_read_entries(settings.models, settings.model_name))
    reasons = {one.path: one.reason for one in entries if one.path and one.reason}
    try:
        state = _choose_state(settings, reasons)
    except ModelError as error:
        return Inventory(tuple(entries), None, to_one_line(error))
    served_paths = {one.path for versions in state.versions_by_model.values() for one in versions}
    entries = [replace(one, is_served=one.path in served_paths) for one in entries]
    for refused in state.refused_versions:
        matching = [
            index
            for index, one in enumerate(entries)
            if one.name == refused.name and refused.version in ("", one.version)
        ]
        for index in matching:
            entries[index] = replace(entries[index], reason=entries[index].reason or refused.reason)
        if not matching:
            entries.append(
                InventoryEntry(refused.name, refused.version, None, None, None, False, refused.reason)
            )
    entries.sort(key=lambda one: (one.name, int(one.version) if one.version.isdecimal() else -1))
    default_model = entries[0].name if settings.models.is_file() else state.default_model
    return Inventory(tuple(entries), default_model, None)


def find_shown_file(reference: str, settings: Settings) -> Path:
    """Return the model file that `reference` names.

    `reference` is `<name>`, `<name>/<version>`, or the path of a folder or file. Names in the repository of
    the settings come before paths. Without a version, return the version that a start would serve, or the
    latest version if none can be served. Raises `ModelError`.
    """
    root, refusals = settings.models, Refusals(settings.state)
    names = repository.list_model_names(root, settings.model_name) if root.is_dir() else []
    name, _, version = reference.rstrip("/").partition("/")
    if name in names and (not version or version.isdecimal()):
        return _find_version_file(root, name, version, refusals)
    path = Path(reference)
    if path.is_file():
        return path
    if not path.is_dir():
        if len(path.parts) > 1 or path.suffix == ".onnx":
            raise ModelError(f"there is no file, folder or NAME/VERSION {reference!r}")
        raise ModelError(f"there is no model {reference!r} in {root}; there are {', '.join(names) or 'none'}")
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    folder = path.resolve()
    if repository.list_version_folders(folder):
        return _find_version_file(folder.parent, folder.name, "", refusals)
    raise ModelError(f"{path} has no {MODEL_FILE}; `fovea models {path}` lists a repository")


def _find_version_file(root: Path, name: str, version: str, refusals: Refusals) -> Path:
    """Return the file of a version; if `version` is empty, of the version that a start would serve."""
    folder = repository.find_model_folder(root, name)
    available_versions = repository.list_available_versions(folder)
    if not available_versions:
        raise ModelError(f"{folder} has no <version>/{MODEL_FILE}")
    if not version:
        choice = repository.choose_versions(root, name, lambda one: _find_reason(one, refusals))
        version = (choice.versions[-1].version if choice.versions else None) or available_versions[-1]
    if version not in available_versions:
        raise ModelError(f"{name} has no version {version}; there are {', '.join(available_versions)}")
    return folder / version / MODEL_FILE


def _find_reason(version: ModelVersion, refusals: Refusals) -> str | None:
    """Return the reason why a version is refused or has no valid contract, or None."""
    try:
        read_contract(version.path)
    except ModelError as error:
        return to_one_line(error)
    return refusals.find_reason(version)


def _choose_state(settings: Settings, reasons: Mapping[Path, str]) -> ServingState:
    """Return the versions that a start would serve, without those in `reasons`.

    Raises `ModelError` when the start would end with an error.
    """
    if settings.strict or settings.models.is_file():
        state = repository.scan_repository(settings.models, settings.default_model, settings.model_name)
        for versions in state.versions_by_model.values():
            for one in versions:
                if reason := reasons.get(one.path):
                    raise ModelError(f"{one.path}: {reason}")
        return state
    refusals = Refusals(settings.state)
    failure_reasons: dict[ModelVersion, str] = {}
    while True:
        state = choose_serving_state(settings, refusals, failure_reasons)
        broken_versions = {
            one: reason
            for versions in state.versions_by_model.values()
            for one in versions
            if (reason := reasons.get(one.path)) and one not in failure_reasons
        }
        if not broken_versions:
            return state
        failure_reasons |= broken_versions


def _read_entries(root: Path, single_name: str | None) -> Iterator[InventoryEntry]:
    """Yield all versions, none of them served yet. Raises `ModelError` when the root cannot be read."""
    if root.is_file():
        entry = _read_entry(root.stem, "", root)
        contract = entry.contract
        name = single_name or (contract.name if contract else entry.name)
        yield replace(entry, name=name, version=contract.version if contract else "")
        return
    for name in repository.list_model_names(root, single_name):
        folder = repository.find_model_folder(root, name)
        try:
            versions = repository.list_version_folders(folder)
        except ModelError:
            continue  # the choice of the versions reports it
        for version in versions:
            yield _read_entry(name, version, folder / version / MODEL_FILE)


def _read_entry(name: str, version: str, path: Path) -> InventoryEntry:
    entry = InventoryEntry(name, version, path, None, None, False, None)
    try:
        entry = replace(entry, size=path.stat().st_size, card=read_model_card(path.parent))
        return replace(entry, contract=read_contract(path))
    except (FileNotFoundError, NotADirectoryError):
        return replace(entry, path=None, reason=f"the folder has no {MODEL_FILE}")
    except OSError as error:
        return replace(entry, reason=f"the file cannot be read: {error.strerror}")
    except ModelError as error:
        return replace(entry, reason=to_one_line(error))
