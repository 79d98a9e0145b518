"""Interface between the watcher of the repository and the processes that serve the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fovea.service.artifact.repository import ModelVersion, ServingState


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

    def serve(self, state: ServingState) -> None:
        """Serve `state` from now on, and nothing else.

        This is called after each `prepare` that has returned, before anything else is awaited: versions that
        were not served before have been prepared. It is also called when only another part of the state has
        changed.
        """
