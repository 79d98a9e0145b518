"""The model repository on disk, with Triton's layout: `<root>/<name>/<version>/model.onnx`.

The folders give the model names and versions, and the highest number is the latest version. An optional
`<name>/config.toml` holds settings of one model. A single file is a repository with one model; its name comes
from its contract.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fovea.service.artifact.model_file import stamp_of
from fovea.service.errors import ModelError, one_line
from fovea.service.validation import reason_of

log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"

CONFIG_FILE: Final = "config.toml"

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Pattern of a model name, where Fovea creates the folder."""

NAME_RULE: Final = "letters, digits and . _ - are taken, such as resnet-50"
"""Description of the name pattern for people."""

DEFAULT_FILE: Final = "default"
"""Name of the file that names the default model. The file lies beside the folders of the models."""


class Config(BaseModel):
    """The settings of one model, `config.toml`. Omitted fields fall back to the service's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    versions: tuple[str, ...] | None = Field(None, min_length=1, strict=False)
    """Versions to serve side by side; by default only the latest version."""
    batch_max: int | None = Field(None, ge=1, le=1024)
    queue_images: int | None = Field(None, ge=1, le=100_000)
    """Limit of this model's accepted and not yet answered images."""
    provider: Literal["auto", "cpu", "cuda"] | None = None
    threads: int | None = Field(None, ge=1, le=256)
    """Number of CPU threads inside one model call, whether the call runs alone or not."""


@dataclass(frozen=True)
class Found:
    """A model file, its name and version from the folders, and its settings."""

    path: Path
    name: str | None
    version: str | None
    stamp: tuple[int, ...]
    """Identity of the file: a replaced file has another stamp."""
    config: Config = field(default_factory=Config)

    @classmethod
    def at(cls, path: Path, name: str | None, version: str | None, config: Config | None = None) -> Found:
        """Describe the file at `path` as it is now. Raises `ModelError` when there is no file."""
        return cls(path, name, version, stamp_of(path), config or Config())

    def to_plain(self) -> dict[str, Any]:
        """Return the values as types that JSON supports."""
        return {
            "path": str(self.path),
            "name": self.name,
            "version": self.version,
            "stamp": self.stamp,
            "config": self.config.model_dump(exclude_none=True),
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Found:
        """Restore the result of `to_plain`."""
        config = Config.model_validate(values["config"])
        return cls(Path(values["path"]), values["name"], values["version"], tuple(values["stamp"]), config)


Shelf: TypeAlias = Mapping[str | None, tuple[Found, ...]]
"""Versions to serve by model name, the latest version last."""


class Refused(NamedTuple):
    """A version in the repository that is not served."""

    name: str
    version: str
    reason: str
    is_pinned: bool = False
    """True if `config.toml` requests this version: no other version may replace it."""


class Served(NamedTuple):
    """The models and versions to serve."""

    shelf: Shelf
    default: str | None
    """Model that answers requests without a model name; None if there is none."""
    refused: tuple[Refused, ...] = ()
    """Versions in the repository that did not pass their checks."""
    waits: bool = False
    """True while the repository has no version that can be served."""

    def to_json(self) -> str:
        """Return JSON for another process."""
        shelf = [[name, [one.to_plain() for one in found]] for name, found in self.shelf.items()]
        return json.dumps([shelf, self.default, self.refused, self.waits])

    @classmethod
    def from_json(cls, written: str) -> Served:
        """Restore the result of `to_json`."""
        shelf, default, refused, waits = json.loads(written)
        return cls(
            {name: tuple(map(Found.from_plain, found)) for name, found in shelf},
            default,
            tuple(Refused(*one) for one in refused),
            waits,
        )


def find(root: Path, named: str | None = None) -> Served:
    """Return the models and versions in a repository that should be served.

    `named` overrides the default model in the repository's own file.

    Raises `ModelError` if the repository has no model, or not the default model.
    """
    if root.is_file():
        return Served({None: find_model(root, None)}, named)
    shelf: Shelf = {name: found for name in names(root) if (found := find_model(root, name))}
    for found in shelf.values():
        warn_of_empty(found[-1])
    if not shelf:
        raise ModelError(f"{root} has no <name>/<version>/{MODEL_FILE}")
    default = named or read_default(root)
    if default and default not in shelf:
        where = "FOVEA_DEFAULT_MODEL" if named else str(root / DEFAULT_FILE)
        raise ModelError(f"{where} is {default!r}; there are {', '.join(sorted(filter(None, shelf)))}")
    return Served(shelf, default or only(shelf))


def first(served: Served, most: int) -> list[Found]:
    """Return the versions to load at the start: at most `most`, or all if `most` is 0.

    The default model and latest versions come before others.
    """
    latest = {versions[-1] for versions in served.shelf.values()}
    every = (found for versions in served.shelf.values() for found in versions)
    wanted = sorted(every, key=lambda one: (one.name != served.default, one not in latest))
    return wanted[: most or None]


def names(root: Path) -> list[str]:
    """Return the names of the folders that may be models.

    Raises `ModelError` when the repository cannot be read.
    """
    try:
        return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ModelError(f"cannot read the repository {root}: {error.strerror}") from None


def find_model(root: Path, name: str | None, version: str | None = None) -> tuple[Found, ...]:
    """Return the versions of one model that should be served, the latest last; empty without a model file.

    `version` overrides `config.toml`. `name` is None if `root` is a single file.

    Raises `ModelError` when that file cannot be read, or when a requested version does not exist.
    """
    if name is None:
        return (Found.at(root, None, None),)
    folder = root / name
    config = read_config(folder)
    usable = _usable(folder)
    asked = (version,) if version else config.versions
    wanted = sorted(set(asked), key=_number) if asked else usable[-1:]
    if missing := [one for one in wanted if one not in usable]:
        what = f"version {missing[0]} of {name}"
        said = f"{what} is" if version else f"{folder / CONFIG_FILE} asks for {what}, which is"
        raise ModelError(f"{said} not there; there are {_listed(usable)}")
    return tuple(_found(folder, one, config) for one in wanted)


def _usable(folder: Path) -> list[str]:
    """Return the versions that have a model file, the latest last. Raises `ModelError`."""
    try:
        numbered = {path.name: path for path in folder.iterdir() if path.name.isdecimal()}
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}") from None
    return sorted((one for one in numbered if (numbered[one] / MODEL_FILE).is_file()), key=int)


def _found(folder: Path, version: str, config: Config) -> Found:
    own = config.model_copy(update={"versions": None})  # a setting of the model only
    return Found.at(folder / version / MODEL_FILE, folder.name, version, own)


class Choice(NamedTuple):
    """The versions of one model to serve."""

    found: tuple[Found, ...]
    """Versions, the latest last."""
    refused: tuple[Refused, ...] = ()
    """Versions that would be served if they had passed their checks."""


def choose(root: Path, name: str, reason: Callable[[Found], str | None]) -> Choice:
    """Return the latest version of a model without a `reason` to refuse it.

    If `config.toml` names versions, consider only these versions, and return all that are not refused.

    `reason` returns the reason to refuse a version, or None. Raises `ModelError` when `config.toml` cannot be
    read.
    """
    folder = root / name
    config = read_config(folder)
    usable = _usable(folder)
    refused: list[Refused] = []
    if config.versions:
        pinned: list[Found] = []
        for version in sorted(set(config.versions), key=_number):
            why: str | None = f"{folder / CONFIG_FILE} asks for it, and it is not there"
            if version in usable:
                found = _found(folder, version, config)
                why = reason(found)
            if why is None:
                pinned.append(found)
            else:
                refused.append(Refused(name, version, why, is_pinned=True))
        return Choice(tuple(pinned), tuple(refused))
    for version in reversed(usable):
        found = _found(folder, version, config)
        why = reason(found)
        if why is None:
            return Choice((found,), tuple(refused))
        refused.append(Refused(name, version, why))
    return Choice((), tuple(refused))


def before(root: Path, found: Found, reason: Callable[[Found], str | None]) -> Found | None:
    """Return the version of a model that would be served without this version, or None."""
    folder = root / (found.name or "")
    for version in reversed(_usable(folder)):
        if _number(version) < _number(found.version or ""):
            other = _found(folder, version, found.config)
            if reason(other) is None:
                return other
    return None


def is_pinned(found: Found) -> bool:
    """Return True if the model's `config.toml` names the versions to serve. Raises `ModelError`."""
    return read_config(found.path.parent.parent).versions is not None


def warn_of_empty(latest: Found) -> None:
    """Log a warning for each higher version without a model file. Called once, at the start."""
    folder = latest.path.parent
    for higher in (one for one in folder.parent.iterdir() if one.name.isdecimal()):
        if int(higher.name) > int(folder.name) and not (higher / MODEL_FILE).is_file():
            log.warning(f"{higher} has no {MODEL_FILE}, and is not served")


def next_version(folder: Path) -> str:
    """Return one more than the highest version number in a model's folder. Raises `OSError`."""
    there = folder.iterdir() if folder.is_dir() else ()
    return str(max((int(path.name) for path in there if path.name.isdecimal()), default=0) + 1)


def read_config(folder: Path) -> Config:
    """Read a model's own settings. Raises `ModelError` that names the file."""
    path = folder / CONFIG_FILE
    try:
        return Config.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ModelError(f"{path}: {'.'.join(map(str, first['loc']))}: {reason_of(first)}") from None
    except ValueError as error:  # invalid TOML or UTF-8
        raise ModelError(f"{path} is not TOML: {error}") from None


def read_default(root: Path) -> str | None:
    """Return the default model set in the repository. Raises `ModelError` when it cannot be read."""
    path = root / DEFAULT_FILE
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}") from None


def only(shelf: Iterable[str | None]) -> str | None:
    """Return the name if there is exactly one model, else None."""
    names = list(shelf)
    return names[0] if len(names) == 1 else None


def keep_default(root: Path) -> None:
    """Record the only model as the default model, before a second model is added.

    Without this record, requests without a model name would lose their model.

    Raises `ModelError` when the repository cannot be read or written.
    """
    if not root.is_dir() or read_default(root) is not None:
        return
    present = (name for name in names(root) if _usable(root / name))
    if name := only(present):
        path = root / DEFAULT_FILE
        # The name starts with a dot and holds the process id, so that two processes do not share the file.
        fresh = root / f".{DEFAULT_FILE}-{os.getpid()}"
        try:
            fresh.write_text(f"{name}\n")
            fresh.replace(path)  # replace atomically: a partly written name would be another name
        except OSError as error:
            raise ModelError(f"cannot write {path}: {error.strerror}") from None


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1


def _listed(versions: list[str]) -> str:
    return ", ".join(versions) or "none"
