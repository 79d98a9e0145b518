"""A loaded model, as requests see it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.embedding import Embedding, find_embedding
from fovea.service.artifact.inputs import InputTensor, input_tensors_of
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import NoEmbedding
from fovea.service.providers import PROVIDERS
from fovea.service.runners.batch_messages import Answer, Item, weight_of
from fovea.service.runners.batcher import LEVEL_COUNT
from fovea.service.runners.lane import Lane
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.serving.statistics import ModelStatistics
from fovea.service.settings import Settings


@dataclass(eq=False)
class LiveModel:
    """A loaded model."""

    name: str
    version: str
    model_version: ModelVersion
    load: LoadCommand
    """Load message that the runners received."""
    contract: Contract
    load_result: LoadedModel
    tensors: tuple[InputTensor, ...]
    """Tensors that the model accepts besides encoded images."""
    lanes: Sequence[Lane[Item, Answer]]
    """Queues of images for the runners, by decode cost: one for each of the `LEVEL_COUNT` levels."""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    images_in_flight: int = 0
    """Number of accepted images that are not yet answered."""
    last_used: float = 0.0
    """Time of the last request for the model on the monotonic clock in seconds."""
    active_requests: int = 0
    """Number of requests that the model has to answer."""
    idle_callbacks: list[Callable[[], None]] = field(default_factory=list)
    """Callbacks that are called once, on the event loop, when the model has no more requests."""
    embedding: Embedding | None = None
    """Tensor with the embedding; None if the model has none."""
    _short_contract: str | None = None
    """Contract as JSON without its golden images, once somebody has asked for it."""

    @classmethod
    def from_load_result(
        cls, model_version: ModelVersion, load: LoadCommand, load_result: LoadedModel, settings: Settings
    ) -> LiveModel:
        """Create the model from the runners' reply to a load message."""
        contract = Contract.from_json(load_result.contract_json)
        # Images of higher levels run in a batch of their own.
        is_gpu = PROVIDERS[load_result.provider].is_gpu
        max_shared_level = LEVEL_COUNT - 2 if is_gpu else 0
        lanes: list[Lane[Item, Answer]] = [
            Lane(
                model_id=load.model_id,
                batch_max=1 if level > max_shared_level else load_result.batch_max,
                weight_max=load_result.batch_bytes,
                weigh=weight_of,
                split_evenly=not is_gpu and not settings.batch_wait_ms,
                max_wait=0.0 if level else settings.batch_wait_ms / 1000,
                level=level,
            )
            for level in range(LEVEL_COUNT)
        ]
        name = model_version.name or settings.model_name or contract.name
        version = model_version.version or contract.version
        tensors = input_tensors_of(contract)
        return cls(
            name,
            version,
            model_version,
            load,
            contract,
            load_result,
            tensors,
            lanes,
            last_used=time.monotonic(),
            embedding=find_embedding(contract),
        )

    def require_embedding(self) -> Embedding:
        """Return the tensor with the embedding. Raises `NoEmbedding`."""
        if self.embedding is None:
            raise NoEmbedding(
                f"model {self.name!r} has no embedding: its answer does not come from one vector by a linear "
                "layer; leave out `embedding`"
            )
        return self.embedding

    async def read_short_contract(self) -> str:
        """Return the contract as JSON with an empty list of golden images.

        The images are most of a contract: 0.9 of 1 MB for an ImageNet model. The first call takes some
        milliseconds, in a thread.
        """
        if self._short_contract is None:
            self._short_contract = await asyncio.to_thread(
                _remove_golden_images, self.load_result.contract_json
            )
        return self._short_contract

    def acquire(self) -> None:
        """Add a request, which keeps the model loaded."""
        self.active_requests += 1

    def release(self) -> None:
        """Remove a request."""
        self.active_requests -= 1
        self._run_idle_callbacks()

    def call_when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the model has no requests.

        `callback` is called here if there are none now, or else by the `release` of the last request.
        """
        self.idle_callbacks.append(callback)
        self._run_idle_callbacks()

    def _run_idle_callbacks(self) -> None:
        """Call the callbacks if the model has no requests."""
        if not self.active_requests:
            # Clear the list first, so that each callback is called once, even if it calls this again.
            callbacks, self.idle_callbacks = self.idle_callbacks, []
            for callback in callbacks:
                callback()


def _remove_golden_images(contract_json: str) -> str:
    """Return a contract as JSON in the same form with an empty list of golden images."""
    document = json.loads(contract_json)
    document["golden"]["images"] = []
    return json.dumps(document, separators=(",", ":"))
