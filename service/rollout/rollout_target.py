"""Interface between the watcher of the repository and the processes that serve the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fovea.service.artifact.repository import ModelVersion, RefusedVersion


class RolloutTarget(Protocol):
    """Interface that applies a change: in this process, or in all workers.

    `Watcher` calls all methods on its event loop, and prepares only one change at a time.
    """

    async def prepare(
        self, name: str | None, versions: Sequence[ModelVersion], *, force: bool = False
    ) -> None:
        """Load versions of a model. Raises `ModelError`; in that case nothing has changed.

        With `force`, the versions are not compared with the served version.
        """

    def commit(self, name: str | None) -> None:
        """Switch to the prepared versions at once.

        This is called once after each `prepare` that has returned, before anything else is awaited.
        """

    def set_default(self, default: str | None) -> None:
        """Set the model that answers requests that name no model."""

    def set_refused_versions(self, refused_versions: Sequence[RefusedVersion], *, is_empty: bool) -> None:
        """Remember the versions that are refused, and whether the repository has no version to serve."""
