"""Models on disk: a repository laid out as Triton's, `<root>/<name>/<version>/model.onnx`.

The folders' names are what a model is called, and the highest number is the latest version. An optional
`<name>/config.toml` says more of one model. A single file is a repository of one, called what its contract
says.
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
"""What a model may be called where we name its folder."""

NAME_RULE: Final = "letters, digits and . _ - are taken, such as resnet-50"
"""The same in words."""

DEFAULT_FILE: Final = "default"
"""Beside the models' folders: the name of the one that answers where a request names none."""


class Config(BaseModel):
    """One model's own settings, `config.toml`; what it leaves out is as for all models."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    versions: tuple[str, ...] | None = Field(None, min_length=1, strict=False)
    """Those that are served, side by side; by default the latest alone."""
    batch_max: int | None = Field(None, ge=1, le=1024)
    queue_images: int | None = Field(None, ge=1, le=100_000)
    """Most of its images accepted and not yet answered."""
    provider: Literal["auto", "cpu", "cuda"] | None = None
    threads: int | None = Field(None, ge=1, le=256)
    """CPU threads inside one model call, alone or not."""


@dataclass(frozen=True)
class Found:
    """A model file, what its folders call it, and its own settings."""

    path: Path
    name: str | None
    version: str | None
    stamp: tuple[int, ...]
    """It is another one whenever the file is."""
    config: Config = field(default_factory=Config)

    @classmethod
    def at(cls, path: Path, name: str | None, version: str | None, config: Config | None = None) -> Found:
        """The file that is there now. Raises `ModelError` when there is none."""
        return cls(path, name, version, stamp_of(path), config or Config())

    def to_plain(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {
            "path": str(self.path),
            "name": self.name,
            "version": self.version,
            "stamp": self.stamp,
            "config": self.config.model_dump(exclude_none=True),
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Found:
        """What `to_plain` has made."""
        config = Config.model_validate(values["config"])
        return cls(Path(values["path"]), values["name"], values["version"], tuple(values["stamp"]), config)


Shelf: TypeAlias = Mapping[str | None, tuple[Found, ...]]
"""By name the versions that are to be served, the latest last."""


class Refused(NamedTuple):
    """A version of a model that is in the repository, and is not served."""

    name: str
    version: str
    reason: str
    is_pinned: bool = False
    """The model's own settings ask for it: no other version may answer in its place."""


class Served(NamedTuple):
    """What is to be served."""

    shelf: Shelf
    default: str | None
    """The model that answers where a request names none; None where there is no such."""
    refused: tuple[Refused, ...] = ()
    """What the repository has besides, that did not pass its checks."""
    waits: bool = False
    """There is nothing yet that could be served."""

    def to_json(self) -> str:
        """For another process."""
        shelf = [[name, [one.to_plain() for one in found]] for name, found in self.shelf.items()]
        return json.dumps([shelf, self.default, self.refused, self.waits])

    @classmethod
    def from_json(cls, written: str) -> Served:
        """What `to_json` has made."""
        shelf, default, refused, waits = json.loads(written)
        return cls(
            {name: tuple(map(Found.from_plain, found)) for name, found in shelf},
            default,
            tuple(Refused(*one) for one in refused),
            waits,
        )


def find(root: Path, named: str | None = None) -> Served:
    """What a repository wants to be served. `named` as the default comes before what its own file says.

    Raises `ModelError` if it holds nothing, or not the default.
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
    """Return the versions that are loaded at the start: all, or at most so many, unless 0; the default model
    and latest versions before others."""
    latest = {versions[-1] for versions in served.shelf.values()}
    every = (found for versions in served.shelf.values() for found in versions)
    wanted = sorted(every, key=lambda one: (one.name != served.default, one not in latest))
    return wanted[: most or None]


def names(root: Path) -> list[str]:
    """Of the folders that may be models. Raises `ModelError` when the repository cannot be read."""
    try:
        return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ModelError(f"cannot read the repository {root}: {error.strerror}") from None


def find_model(root: Path, name: str | None, version: str | None = None) -> tuple[Found, ...]:
    """The versions of one model that are to be served, the latest last; none where it has no model file.

    `version` comes before what its `config.toml` says. `name` is None where `root` is a single file.
    Raises `ModelError` when that file cannot be read, or when a version is asked for that is not there.
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
    """The versions in a model's folder that have a model file, the latest last. Raises `ModelError`."""
    try:
        numbered = {path.name: path for path in folder.iterdir() if path.name.isdecimal()}
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}") from None
    return sorted((one for one in numbered if (numbered[one] / MODEL_FILE).is_file()), key=int)


def _found(folder: Path, version: str, config: Config) -> Found:
    own = config.model_copy(update={"versions": None})  # which are served is no setting of each
    return Found.at(folder / version / MODEL_FILE, folder.name, version, own)


class Choice(NamedTuple):
    """What is to be served of one model."""

    found: tuple[Found, ...]
    """The versions, the latest last."""
    refused: tuple[Refused, ...] = ()
    """Those that would be in their place, had they not been refused."""


def choose(root: Path, name: str, reason: Callable[[Found], str | None]) -> Choice:
    """Return the latest version of a model for which there is no `reason` not to serve it. Where its
    `config.toml` names versions, those of them, and no others.

    Raises `ModelError` when that file cannot be read.
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
    """Return the version of a model that would be served without this one."""
    folder = root / (found.name or "")
    for version in reversed(_usable(folder)):
        if _number(version) < _number(found.version or ""):
            other = _found(folder, version, found.config)
            if reason(other) is None:
                return other
    return None


def is_pinned(found: Found) -> bool:
    """Whether its model's `config.toml` says which versions are served."""
    return read_config(found.path.parent.parent).versions is not None


def warn_of_empty(latest: Found) -> None:
    """Say once, at the start, that a higher version has no model file."""
    folder = latest.path.parent
    for higher in (one for one in folder.parent.iterdir() if one.name.isdecimal()):
        if int(higher.name) > int(folder.name) and not (higher / MODEL_FILE).is_file():
            log.warning(f"{higher} has no {MODEL_FILE}, and is not served")


def next_version(folder: Path) -> str:
    """One more than the highest number that stands in a model's folder. Raises `OSError`."""
    there = folder.iterdir() if folder.is_dir() else ()
    return str(max((int(path.name) for path in there if path.name.isdecimal()), default=0) + 1)


def read_config(folder: Path) -> Config:
    """A model's own settings. Raises `ModelError` that names the file."""
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
    except ValueError as error:  # of TOML, or of UTF-8
        raise ModelError(f"{path} is not TOML: {error}") from None


def read_default(root: Path) -> str | None:
    """The model that the repository itself makes the default. Raises `ModelError` when it cannot be read."""
    path = root / DEFAULT_FILE
    try:
        return path.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}") from None


def only(shelf: Iterable[str | None]) -> str | None:
    """The only model needs no word to be the default."""
    names = list(shelf)
    return names[0] if len(names) == 1 else None


def keep_default(root: Path) -> None:
    """Before a model comes beside the only one: that goes on answering where a request names none.

    Raises `ModelError` when the repository cannot be read, or written.
    """
    if not root.is_dir() or read_default(root) is not None:
        return
    present = (name for name in names(root) if _usable(root / name))
    if name := only(present):
        path = root / DEFAULT_FILE
        fresh = root / f".{DEFAULT_FILE}-{os.getpid()}"
        try:
            fresh.write_text(f"{name}\n")
            fresh.replace(path)  # half a name would be another one
        except OSError as error:
            raise ModelError(f"cannot write {path}: {error.strerror}") from None


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1


def _listed(versions: list[str]) -> str:
    return ", ".join(versions) or "none"
