"""The model repository on disk, with Triton's layout: `<root>/<name>/<version>/model.onnx`.

The folders give the model names and versions, and the highest number is the latest version. An optional
`<name>/config.toml` holds settings of one model. A single file is a repository with one model, and so is a
root with the versions of one model, `<root>/<version>/model.onnx`, which platforms mount. The name of such a
model is FOVEA_MODEL_NAME, or the name in its contract.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fovea.service.artifact.contract_file import read_contract
from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.atomic_files import WriteError, write_file
from fovea.service.errors import ModelError, to_one_line
from fovea.service.providers import ProviderSetting
from fovea.service.validation import describe_error

log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"

CONFIG_FILE: Final = "config.toml"

MODEL_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Pattern of a model name, where Fovea creates the folder."""

MODEL_NAME_RULE: Final = "use letters, digits and . _ - with a letter or digit first, such as resnet-50"
"""Description of the name pattern for people."""

DEFAULT_MODEL_FILE: Final = "default"
"""Name of the file that names the default model. The file lies beside the folders of the models."""


class ModelConfig(BaseModel):
    """The settings of one model, `config.toml`. Omitted fields fall back to the service's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    versions: tuple[str, ...] | None = Field(None, min_length=1, strict=False)
    """Versions to serve side by side; by default only the latest version."""
    batch_max: int | None = Field(None, ge=1, le=1024)
    queue_images: int | None = Field(None, ge=1, le=100_000)
    """Limit of this model's accepted and not yet answered images."""
    provider: ProviderSetting | None = None
    threads: int | None = Field(None, ge=1, le=256)
    """Number of CPU threads of one model call, for exclusive calls too."""


@dataclass(frozen=True)
class ModelVersion:
    """A model file, its name and version from the folders, and its settings."""

    path: Path
    name: str | None
    version: str | None
    fingerprint: tuple[int, ...]
    """Identity of the file: a replaced file has another fingerprint."""
    config: ModelConfig = field(default_factory=ModelConfig)

    @classmethod
    def from_path(
        cls, path: Path, name: str | None, version: str | None, config: ModelConfig | None = None
    ) -> ModelVersion:
        """Describe the file at `path` as it is now. Raises `ModelError` when there is no file."""
        return cls(path, name, version, fingerprint_of(path), config or ModelConfig())


VersionsByModel: TypeAlias = Mapping[str | None, tuple[ModelVersion, ...]]
"""Versions to serve by model name, the latest version last."""


class RefusedVersion(NamedTuple):
    """A version in the repository that is not served."""

    name: str
    version: str
    reason: str
    is_pinned: bool = False
    """True if `config.toml` requests this version: no other version may replace it."""


class ServingState(NamedTuple):
    """The models and versions to serve."""

    versions_by_model: VersionsByModel
    default_model: str | None
    """Model that answers requests without a model name; None if there is none."""
    refused_versions: tuple[RefusedVersion, ...] = ()
    """Versions in the repository that did not pass their checks."""
    is_empty: bool = False
    """True while the repository has no version that can be served."""


def scan_repository(
    root: Path, default_override: str | None = None, single_name: str | None = None
) -> ServingState:
    """Return the models and versions in a repository that should be served.

    `default_override` overrides the default model in the repository's own file. `single_name` is as in
    `list_model_names`.

    Raises `ModelError` if the repository has no model, or not the default model.
    """
    if root.is_file():
        return ServingState({None: find_versions(root, None)}, default_override)
    versions_by_model: VersionsByModel = {
        name: versions
        for name in list_model_names(root, single_name)
        if (versions := find_versions(root, name))
    }
    for versions in versions_by_model.values():
        warn_about_empty_versions(versions[-1])
    if not versions_by_model:
        raise ModelError(f"{root} has no <name>/<version>/{MODEL_FILE}")
    default_model = default_override or read_default_model(root)
    if default_model and default_model not in versions_by_model:
        source = "FOVEA_DEFAULT_MODEL" if default_override else str(root / DEFAULT_MODEL_FILE)
        raise ModelError(
            f"{source} is {default_model!r}; there are {', '.join(sorted(filter(None, versions_by_model)))}"
        )
    return ServingState(versions_by_model, default_model or find_single_model(versions_by_model))


def select_initial_versions(state: ServingState, max_versions: int) -> list[ModelVersion]:
    """Return the versions to load at the start: at most `max_versions`, or all if `max_versions` is 0.

    The default model and latest versions come before others.
    """
    latest = {versions[-1] for versions in state.versions_by_model.values()}
    all_versions = (version for versions in state.versions_by_model.values() for version in versions)
    candidates = sorted(all_versions, key=lambda one: (one.name != state.default_model, one not in latest))
    return candidates[: max_versions or None]


def list_model_names(root: Path, single_name: str | None = None) -> list[str]:
    """Return the names of the folders that may be models.

    If the root itself has the versions of one model, its name is `single_name`, or else the name in the
    contract of the oldest version, which no new version changes.

    Raises `ModelError` when the repository cannot be read.
    """
    try:
        names = sorted(
            path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise ModelError(f"cannot read the repository {root}: {error.strerror}") from None
    if not has_versions_of_one_model(root, names):
        return names
    return [single_name or _read_single_name(root)]


def has_versions_of_one_model(root: Path, names: Iterable[str] | None = None) -> bool:
    """Return True if the layout is `<root>/<version>/model.onnx`. `names` are the root's entries if known.

    A stray `<root>/1/model.onnx` does not hide the models of a repository: they take precedence.
    """
    try:
        numbers = (one for one in names or (path.name for path in root.iterdir()) if one.isdecimal())
        if not any((root / one / MODEL_FILE).is_file() for one in numbers):
            return False
        return next(root.glob(f"[!.]*/[0-9]*/{MODEL_FILE}"), None) is None
    except OSError:
        return False


def find_model_folder(root: Path, name: str) -> Path:
    """Return the folder with the versions of a model, which may not exist."""
    folder = root / name
    if next(folder.glob(f"[0-9]*/{MODEL_FILE}"), None) or not has_versions_of_one_model(root):
        return folder
    return root


def _read_single_name(root: Path) -> str:
    for version in list_available_versions(root):
        with suppress(ModelError):  # the version is refused later, with its reason
            return read_contract(root / version / MODEL_FILE).name
    return root.resolve().name


def find_versions(root: Path, name: str | None, version: str | None = None) -> tuple[ModelVersion, ...]:
    """Return the versions of one model that should be served, the latest last; empty without a model file.

    `version` overrides `config.toml`. `name` is None if `root` is a single file.

    Raises `ModelError` when that file cannot be read, or when a requested version does not exist.
    """
    if name is None:
        return (ModelVersion.from_path(root, None, None),)
    folder = find_model_folder(root, name)
    config = read_config(folder)
    available_versions = list_available_versions(folder)
    requested_versions = (version,) if version else config.versions
    selected_versions = (
        sorted(set(requested_versions), key=_version_number)
        if requested_versions
        else available_versions[-1:]
    )
    if missing_versions := [one for one in selected_versions if one not in available_versions]:
        subject = f"version {missing_versions[0]} of {name}"
        prefix = subject if version else f"{folder / CONFIG_FILE} asks for {subject}, which"
        raise ModelError(f"{prefix} does not exist; there are {_join_versions(available_versions)}")
    return tuple(_describe_version(folder, name, one, config) for one in selected_versions)


def list_version_folders(folder: Path) -> list[str]:
    """Return the versions that have a folder, the latest last. Raises `ModelError`."""
    try:
        return sorted((path.name for path in folder.iterdir() if path.name.isdecimal()), key=int)
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}") from None


def list_available_versions(folder: Path) -> list[str]:
    """Return the versions that have a model file, the latest last. Raises `ModelError`."""
    try:
        return [one for one in list_version_folders(folder) if (folder / one / MODEL_FILE).is_file()]
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from None


def _describe_version(folder: Path, name: str, version: str, config: ModelConfig) -> ModelVersion:
    version_config = config.model_copy(update={"versions": None})  # a setting of the model only
    return ModelVersion.from_path(folder / version / MODEL_FILE, name, version, version_config)


class VersionChoice(NamedTuple):
    """The versions of one model to serve."""

    versions: tuple[ModelVersion, ...]
    """Versions, the latest last."""
    refused_versions: tuple[RefusedVersion, ...] = ()
    """Versions that would be served if they had passed their checks."""


def choose_versions(
    root: Path, name: str, reason_to_refuse: Callable[[ModelVersion], str | None]
) -> VersionChoice:
    """Return the latest version of a model that `reason_to_refuse` does not refuse.

    If `config.toml` names versions, consider only these versions, and return all that are not refused.

    `reason_to_refuse` returns the reason to refuse a version, or None. It is called in this thread, from the
    highest version down, until it accepts one. It may read files, so an event loop calls `choose_versions` in
    another thread. Raises `ModelError` when `config.toml` cannot be read.
    """
    folder = find_model_folder(root, name)
    config = read_config(folder)
    available_versions = list_available_versions(folder)
    refused_versions: list[RefusedVersion] = []
    if config.versions:
        pinned_versions: list[ModelVersion] = []
        for version in sorted(set(config.versions), key=_version_number):
            refusal: str | None = f"{folder / CONFIG_FILE} asks for it, but it does not exist"
            if version in available_versions:
                candidate = _describe_version(folder, name, version, config)
                refusal = reason_to_refuse(candidate)
            if refusal is None:
                pinned_versions.append(candidate)
            else:
                refused_versions.append(RefusedVersion(name, version, refusal, is_pinned=True))
        return VersionChoice(tuple(pinned_versions), tuple(refused_versions))
    for version in reversed(available_versions):
        candidate = _describe_version(folder, name, version, config)
        refusal = reason_to_refuse(candidate)
        if refusal is None:
            return VersionChoice((candidate,), tuple(refused_versions))
        refused_versions.append(RefusedVersion(name, version, refusal))
    return VersionChoice((), tuple(refused_versions))


def find_fallback_version(
    root: Path, model_version: ModelVersion, reason_to_refuse: Callable[[ModelVersion], str | None]
) -> ModelVersion | None:
    """Return the version of a model that would be served without this version, or None."""
    name = model_version.name or ""
    folder = find_model_folder(root, name)
    for version in reversed(list_available_versions(folder)):
        if _version_number(version) < _version_number(model_version.version or ""):
            candidate = _describe_version(folder, name, version, model_version.config)
            if reason_to_refuse(candidate) is None:
                return candidate
    return None


def is_pinned(version: ModelVersion) -> bool:
    """Return True if the model's `config.toml` names the versions to serve. Raises `ModelError`."""
    return read_config(version.path.parent.parent).versions is not None


def warn_about_empty_versions(latest: ModelVersion) -> None:
    """Log a warning for each higher version without a model file. Called once, at the start."""
    folder = latest.path.parent
    for higher in (one for one in folder.parent.iterdir() if one.name.isdecimal()):
        if int(higher.name) > int(folder.name) and not (higher / MODEL_FILE).is_file():
            log.warning(f"{higher} has no {MODEL_FILE} and is not served")


def next_version(folder: Path) -> str:
    """Return one more than the highest version number in a model's folder. Raises `OSError`."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return str(max((int(path.name) for path in entries if path.name.isdecimal()), default=0) + 1)


def read_config(folder: Path) -> ModelConfig:
    """Read a model's own settings. Raises `ModelError` that names the file."""
    path = folder / CONFIG_FILE
    try:
        return ModelConfig.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        return ModelConfig()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first_error = error.errors(include_url=False, include_input=False)[0]
        raise ModelError(
            f"{path}: {'.'.join(map(str, first_error['loc']))}: {describe_error(first_error)}"
        ) from None
    except ValueError as error:  # invalid TOML or UTF-8
        raise ModelError(f"{path} is not TOML: {error}") from None


def read_default_model(root: Path) -> str | None:
    """Return the default model set in the repository. Raises `ModelError` when it cannot be read."""
    path = root / DEFAULT_MODEL_FILE
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {to_one_line(error)}") from None


def find_single_model(model_names: Iterable[str | None]) -> str | None:
    """Return the name if there is exactly one model, else None."""
    names = list(model_names)
    return names[0] if len(names) == 1 else None


def record_default_model(root: Path) -> None:
    """Record the only model as the default model, before a second model is added.

    Without this record, requests without a model name would lose their model.

    Raises `ModelError` when the repository cannot be read or written.
    """
    if not root.is_dir() or has_versions_of_one_model(root) or read_default_model(root) is not None:
        return
    model_names = (name for name in list_model_names(root) if list_available_versions(root / name))
    if name := find_single_model(model_names):
        try:
            write_file(root / DEFAULT_MODEL_FILE, f"{name}\n")  # a partly written name would be another name
        except WriteError as error:
            raise ModelError(str(error)) from None


def _version_number(version: str) -> int:
    return int(version) if version.isdecimal() else -1


def _join_versions(versions: list[str]) -> str:
    return ", ".join(versions) or "none"
