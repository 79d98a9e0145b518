"""Choice of the versions of a model that should be served, by its folder and the refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from fovea.service.artifact import repository
from fovea.service.artifact.repository import ModelVersion, RefusedVersion
from fovea.service.errors import ModelError
from fovea.service.rollout.refusals import Refusals


class VersionChoice(NamedTuple):
    """Versions of one model that should be served now."""

    versions: tuple[ModelVersion, ...]
    refused_versions: tuple[RefusedVersion, ...]
    force: bool
    """True to skip the comparison."""


class VersionChooser:
    """Reader of the repository for `Watcher`."""

    def __init__(self, root: Path, refusals: Refusals, single_name: str | None = None) -> None:
        self._root = root
        self._single_name = single_name
        self._refusals = refusals

    def list_names(self, served_names: Collection[str | None]) -> set[str | None]:
        """Return the names of the models in the repository and of the served models.

        Runs in a thread, because it reads folders. Raises `ModelError` if the repository has become empty: it
        may just not be mounted, and no model must be removed then.
        """
        if self._root.is_file() or None in served_names:
            return {None}
        names = repository.list_model_names(self._root, self._single_name)
        if not names and served_names:
            raise ModelError(f"the repository {self._root} is empty; the served models stay")
        return {*names, *served_names}

    def _find_folder(self, name: str) -> Path:
        return repository.find_model_folder(self._root, name)

    async def find_versions(self, name: str | None, version: str | None) -> tuple[ModelVersion, ...]:
        """Return the versions of a model that its folder asks for."""
        if name is not None and not self._find_folder(name).is_dir():
            return ()
        return await asyncio.to_thread(repository.find_versions, self._root, name, version)

    async def choose(
        self, name: str | None, pinned_version: str | None, served_versions: Sequence[ModelVersion]
    ) -> VersionChoice:
        """Choose the versions of a model by its folder, by a requested version, and by the refusals."""
        if name is None or not self._find_folder(name).is_dir():
            return VersionChoice(await self.find_versions(name, pinned_version), (), force=False)
        if pinned_version:
            return await asyncio.to_thread(self._choose_pinned, name, pinned_version, served_versions)
        return await asyncio.to_thread(self._choose_versions, name, served_versions)

    def _choose_pinned(
        self, name: str, pinned_version: str, served_versions: Sequence[ModelVersion]
    ) -> VersionChoice:
        """Choose the version that a request asked for, unless its file was replaced by a refused one.

        Runs in a thread, because it reads files.
        """
        versions = repository.find_versions(self._root, name, pinned_version)
        reason = None if versions == tuple(served_versions) else self._refusals.find_reason(versions[0])
        if reason is None:
            return VersionChoice(versions, (), force=False)
        return VersionChoice((), (RefusedVersion(name, pinned_version, reason),), force=False)

    def _choose_versions(self, name: str, served_versions: Sequence[ModelVersion]) -> VersionChoice:
        """Choose the versions of a model by its folder and the refusals.

        Runs in a thread, because it reads files.
        """
        choice = repository.choose_versions(self._root, name, self._refusals.find_reason)
        if any(one.is_pinned for one in choice.refused_versions):  # all configured versions or no change
            return VersionChoice((), choice.refused_versions, force=False)
        is_refused_elsewhere = any(self._refusals.find_reason(one) for one in served_versions)
        is_accepted = bool(choice.versions) and self._refusals.is_accepted(choice.versions[-1])
        return VersionChoice(
            choice.versions, choice.refused_versions, force=is_refused_elsewhere or is_accepted
        )
