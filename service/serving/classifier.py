"""Classification of encoded images. Every protocol uses it."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final, NamedTuple, TypeAlias

from fovea.service.access.caller_limits import CallerLimits
from fovea.service.access.caller_table import CallerTable
from fovea.service.artifact.model_file import PinnedFile
from fovea.service.artifact.repository import ModelVersion, ServingState, scan_repository
from fovea.service.errors import (
    Internal,
    NotReady,
    Overloaded,
    RequestError,
    ShareExceeded,
    Unavailable,
)
from fovea.service.inference.boxes import Boxes, PixelBox
from fovea.service.inference.decode_cost import estimate_cost
from fovea.service.inference.decode_memory import process_share
from fovea.service.observability.metrics import Metrics
from fovea.service.resources import threads
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.runners import shared_memory
from fovea.service.runners.batch_messages import Answer, BoxAnswers, ImageRequest, Item, count_results
from fovea.service.runners.batcher import LEVEL_COUNT, Batcher
from fovea.service.runners.child_process import LOAD_TIMEOUT_FACTOR
from fovea.service.runners.lane import INFINITY, Job, Lane
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.runners.memory_plan import create_spare_memory
from fovea.service.runners.pool import RunnerPool
from fovea.service.runners.runner_interface import RunnerLost
from fovea.service.runners.shared_memory import SharedBodies, SharedRef, read_shared
from fovea.service.serving import recent_images
from fovea.service.serving.catalog import ModelCatalog
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.prediction_tally import PredictionTally
from fovea.service.serving.process_plan import create_plan
from fovea.service.serving.recent_images import RecentImages
from fovea.service.settings import Settings

log = logging.getLogger(__name__)


class Classification(NamedTuple):
    """Answer for one image, and the model that produced it."""

    model: LiveModel
    answer: Answer


class BoxClassification(NamedTuple):
    """Answers for the boxes of one image, and the model that produced them."""

    model: LiveModel
    boxes: Boxes
    outcome: BoxAnswers


AnswerCallback: TypeAlias = Callable[[Answer | BoxAnswers | Exception, Job], None]
"""Callback with the outcome and the job of an image, such as `RequestRecord.add_image`. The classifier calls
it on the event loop before the caller gets the outcome, and logs any exception that it raises."""


_LEVEL_SECONDS: Final = (0.025, 0.25)
"""Estimated decode time in seconds from which an image belongs to the next level. A phone photograph takes
0.04 s, a 48 MP PNG 1.7 s."""


_COSTLY_DIVISOR: Final = 4
"""Divisor of the queue for the most expensive images: they may take every fourth place in the queue."""

_MAX_UNLOADED: Final = 20
"""Number of unloaded versions whose series are still exposed, so that scrapes see their last counts."""


class Classifier:
    """Models, runners and admission control.

    Only the constructor may run before the event loop. Every other method must be called on the event loop
    that runs `start`, so that no method needs a lock.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        state: ServingState | None = None,
        caller_table: CallerTable | None = None,
    ) -> None:
        """Start the runners and wait until they have loaded the models. Raises `ModelError`.

        `state` is the desired state if it differs from the current content of the repository. `caller_table`
        has the counts of callers that several workers share.
        """
        self.settings = settings
        self.metrics = metrics
        self.thread_plan = threads.plan_threads(
            settings,
            threads.available_cpus() / settings.workers,
            gpu=threads.expects_gpu(settings.provider),
        )
        state = state or scan_repository(settings.models, settings.default_model, settings.model_name)
        self.catalog = ModelCatalog(settings, state, metrics)
        self.shared_bodies = SharedBodies(
            settings.queue_images,
            settings.body_bytes,
            max_resident_bytes=min(shared_memory.MAX_RESIDENT_BYTES, settings.bodies_bytes // 8),
        )
        self._model_ids = count()
        self._pinned_files: dict[int, PinnedFile] = {}
        """Open model files by the model's id in the runners."""
        self._unloaded_models: deque[LiveModel] = deque()
        """Unloaded models, the most recent last."""
        initial_versions = self.catalog.initial_versions(settings.models_loaded)
        loads = [self.create_load(version) for version in initial_versions]
        plan = create_plan(settings, self.thread_plan)
        try:
            self.runners = RunnerPool(
                plan,
                loads,
                metrics,
                self.shared_bodies,
                batch_timeout=settings.batch_timeout,
                load_timeout=LOAD_TIMEOUT_FACTOR * settings.trial_seconds,
                runner_wait=settings.runner_wait,
            )
        except BaseException:  # the start goes on without the broken models, in the same process
            self._close_files()
            raise
        # Before the first image: from here on no runner can change what other runners read.
        for pinned_file in self._pinned_files.values():
            pinned_file.seal_weights()
        self._decode_share = process_share(plan.decode_bytes, plan.processes)
        self._decode_limit = plan.decode_bytes - plan.processes * self._decode_share
        self.on_model_lost: Callable[[int], None] = lambda model_id: None
        """Callback for a model that was lost with the last runners and cannot be loaded by new runners, with
        its id in the runners. It is called on the event loop, and must take the model out of the catalog."""
        self._batcher = Batcher(metrics, memory=self._decode_limit)
        self.caller_limits = CallerLimits.create(settings, caller_table, self._batcher.drain_seconds)
        """Limits of each caller; None if there are none."""
        self._prediction_tallies: dict[LiveModel, PredictionTally] = {}
        self._recent_images: dict[str, RecentImages] = {}
        for version, load, load_result in zip(
            initial_versions, loads, self.runners.setup_reply.models, strict=True
        ):
            self.catalog.add(self.create_model(version, load, load_result))
        self.catalog.check_default_model()
        metrics.images_limit.set(settings.queue_images)
        metrics.runners_expected.set(plan.processes * settings.workers)
        self.spare_memory = create_spare_memory(
            settings, self._batcher.reserve_memory, self._batcher.release_memory
        )
        """Memory that explanation and trial processes must reserve from; None if memory is not limited."""
        self.images_in_flight = 0
        """Number of accepted images that are not yet answered."""
        metrics.add_gauge_setter(lambda: metrics.images_in_flight.set(self.images_in_flight))
        self.body_memory = BodyMemory(settings.bodies_bytes)

    def create_load(self, version: ModelVersion) -> LoadCommand:
        """Return the load message for the runners, with a new model id.

        The model's file stays open until `close_file`, so that runners which start later read the same file.

        Raises `ModelError` when the file has changed since it was found.
        """
        plan = create_plan(self.settings, self.thread_plan, version.config)
        pinned_file = PinnedFile(version.path, version.fingerprint)
        model_id = next(self._model_ids)
        self._pinned_files[model_id] = pinned_file
        return LoadCommand(
            model_id,
            str(version.path),
            pinned_file.path,
            version.fingerprint,
            plan,
            pinned_file.weights_file,
        )

    def seal_weights(self, load: LoadCommand) -> None:
        """Seal the memory file of a model's weights, before runners load the model."""
        self._pinned_files[load.model_id].seal_weights()

    def close_file(self, load: LoadCommand) -> None:
        """Close a model's file, because no process needs it any more."""
        self._pinned_files.pop(load.model_id).close()

    def create_model(self, version: ModelVersion, load: LoadCommand, load_result: LoadedModel) -> LiveModel:
        """Create a model that the runners have loaded, with its metrics."""
        model = LiveModel.from_load_result(version, load, load_result, self.settings)
        self._prediction_tallies[model] = PredictionTally(
            model, self.metrics, drift_images=self.settings.drift_images
        )
        max_bytes = min(recent_images.MAX_BYTES, self.settings.bodies_bytes // 16)
        self._recent_images.setdefault(
            model.name, RecentImages(self.settings.replay_images, self._fetch_image, max_bytes=max_bytes)
        )
        for result in ("loaded", "refused"):  # create at 0: PromQL ignores the first value
            self.metrics.model_changes.labels(model.name, result)
        for method in ("cam", "occlusion"):
            self.metrics.explanations.labels(model.name, model.version, method)
        return model

    def unload(self, model: LiveModel) -> None:
        """Unload a model that has no requests from the runners, and close its file.

        With one worker, the model's series are removed after `_MAX_UNLOADED` more models are unloaded. With
        several workers, the series stay.
        """
        # Unload first: until then a runner that starts may still open the file.
        self.runners.unload_model(model.load.model_id)
        self.close_file(model.load)
        del self._prediction_tallies[model]
        if all(other.name != model.name for other in self._prediction_tallies):
            del self._recent_images[model.name]  # the next version will have no version to compare with
        self._unloaded_models.append(model)
        if len(self._unloaded_models) > _MAX_UNLOADED and self.settings.workers == 1:
            self._remove_series(self._unloaded_models.popleft())

    def _remove_series(self, model: LiveModel) -> None:
        """Remove a model's series, unless the same version is served or listed again."""
        identity = (model.name, model.version)
        if all(
            identity != (other.name, other.version)
            for other in [*self._prediction_tallies, *self._unloaded_models]
        ):
            self.metrics.remove_version(*identity)

    def _handle_lost_model(self, model_id: int) -> None:
        """Refuse the waiting images of a model that was lost with its runners.

        The runner pool calls this on the event loop, and needs the lanes to be empty when it returns: no
        runner will ever take images of this model.
        """
        model = next((one for one in self._prediction_tallies if one.load.model_id == model_id), None)
        if model:
            message = (
                f"model {model.name!r} was lost with its runners and cannot be loaded again; the log says why"
            )
            for lane in model.lanes:
                self._batcher.close_lane(lane, NotReady(message, retry_after=5.0))
        self.on_model_lost(model_id)

    def get_recent_images(self, name: str) -> list[bytes]:
        """Return the last images of a model, or some of them."""
        return self._recent_images[name].images if name in self._recent_images else []

    def _fetch_image(self, ref: SharedRef) -> bytes:
        """Copy an image out of shared memory. The image's request must not be over yet."""
        return read_shared(self.shared_bodies.descriptor, ref)

    async def start(self) -> None:
        """Attach the runners to the running event loop."""
        await self.runners.attach(self._batcher, self._handle_lost_model)

    async def close(self) -> None:
        """Stop the runners, then release shared memory and close the model files."""
        await self.runners.close()
        self._close_files()

    def _close_files(self) -> None:
        """Release the shared memory and the model files. The runners read from them, and must have ended."""
        self.shared_bodies.close()
        for pinned_file in self._pinned_files.values():
            pinned_file.close()

    def submit_image(
        self,
        image: Item,
        model: LiveModel,
        on_outcome: Callable[[Any], None],
        *,
        deadline: float,
        on_answer: AnswerCallback,
        caller: str | None = None,
    ) -> Job:
        """Classify an image and call `on_outcome` on the event loop with its outcome.

        The outcome is the same as `classify_images` returns for one image. The caller holds a place for the
        image (`Admission`). An image that is still queued at `deadline` (monotonic, in seconds) or after
        `cancel` is dropped. The images of callers with names wait in turn: `caller` is
        `CallerReservation.queue_name`. Raises `Overloaded` when too many images with a similar decode cost
        are queued, or `ShareExceeded` when the caller has too many of them.
        """

        # The batcher calls this once, on the event loop, unless the job is cancelled before. The image's
        # shared memory is still reserved then, because `_count_image` may copy the image.
        def handle_outcome(outcome: Any, job: Job) -> None:
            is_answer = isinstance(outcome, Answer)
            result = Classification(model, outcome) if is_answer else _convert_outcome(outcome, model)
            self._count_image(outcome, model, job, on_answer)
            model.statistics.count_request(job.arrived_at, is_success=is_answer)
            # This call comes last: it may end the request and release the image's memory.
            on_outcome(result)

        lane, memory = self._choose_lane(image, model, caller)
        return self._batcher.enqueue(
            image, lane, handle_outcome, deadline=deadline, memory=memory, caller=caller
        )

    def _choose_lane(
        self, image: Item, model: LiveModel, caller: str | None = None
    ) -> tuple[Lane[Item, Answer], int]:
        """Return the lane for an image by its decode cost, and the memory in bytes to reserve for decoding.

        Raises `Overloaded` or `ShareExceeded` when too many images with that cost are queued.
        """
        boxes = None
        if isinstance(image, ImageRequest):
            if image.tensor_name:
                return model.lanes[0], 0
            boxes, image = image.boxes, image.content
        content = self.shared_bodies.view(image.offset, image.size) if isinstance(image, SharedRef) else image
        max_pixels = self.settings.image_pixels
        cost = estimate_cost(content, model.contract.input, max_pixels=max_pixels, boxes=boxes)
        if cost is None:
            level, memory = LEVEL_COUNT - 1, self._decode_limit
        else:
            seconds = cost.seconds + _estimate_box_seconds(boxes, model) if boxes else cost.seconds
            level = bisect_right(_LEVEL_SECONDS, seconds)
            memory = cost.memory_bytes if cost.memory_bytes > self._decode_share else 0
        if level == LEVEL_COUNT - 1:
            self._check_costly_capacity(caller)
        return model.lanes[level], memory

    def _check_costly_capacity(self, caller: str | None) -> None:
        """Raise `Overloaded` or `ShareExceeded` if too many of the most expensive images wait."""
        level, limit = LEVEL_COUNT - 1, max(1, self.settings.queue_images // _COSTLY_DIVISOR)
        if self._batcher.count_waiting(level) >= limit:
            raise self.create_overload_error(
                f"{limit} images that take long to decode, or have many boxes, are already waiting; the "
                "limit is a quarter of FOVEA_QUEUE_IMAGES"
            )
        if caller is not None and self.caller_limits:
            counts = self._batcher.count_callers(level)
            counts[caller] += 1
            self.caller_limits.check_share(
                count=counts[caller], total=counts.total(), callers=len(counts), limit=limit
            )

    def cancel(self, job: Job) -> None:
        """Cancel a job of `submit_image`, because its caller has left."""
        self._batcher.cancel(job)

    async def classify_images(
        self,
        images: Sequence[Item],
        model: LiveModel,
        *,
        deadline: float = INFINITY,
        on_answer: AnswerCallback,
        caller: str | None = None,
    ) -> list[Classification | BoxClassification | RequestError]:
        """Classify images and return one answer or error per image, in order.

        An error of an image is a decoding error, `BadRequest` if a tensor gives no numbers, or `Internal` if
        the image killed two runners. Errors that concern the whole request and unexpected exceptions are
        raised. Cancelling the call cancels the jobs. `submit_image` describes the parameters.
        """

        def convert_outcome(
            outcome: Answer | BoxAnswers | Exception, job: Job
        ) -> Classification | BoxClassification | RequestError | BaseException:
            # The batcher calls this on the event loop for each image as it is answered. Counting all images
            # at once, after the last one, would block the event loop.
            self._count_image(outcome, model, job, on_answer)
            if isinstance(outcome, BoxAnswers):
                return BoxClassification(model, job.item.boxes, outcome)
            return _convert_outcome(outcome, model)

        started_at = time.monotonic()
        futures: list[asyncio.Future[Any]] = []
        try:
            for image in images:
                futures.append(self._queue_image(image, model, deadline, caller, convert_outcome))
        except BaseException:  # nobody will wait for the images before this one: their jobs must end
            for future in futures:
                future.cancel()
            raise
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        succeeded = all(isinstance(outcome, Classification | BoxClassification) for outcome in outcomes)
        model.statistics.count_request(started_at, is_success=succeeded)
        return [_check_outcome(outcome) for outcome in outcomes]

    def _queue_image(
        self,
        image: Item,
        model: LiveModel,
        deadline: float,
        caller: str | None,
        convert: Callable[[Any, Job], Any],
    ) -> asyncio.Future[Any]:
        """Queue an image and return a future for its outcome.

        `Overloaded` and `ShareExceeded` become the image's own outcome.
        """
        try:
            lane, memory = self._choose_lane(image, model, caller)
        except (Overloaded, ShareExceeded) as error:
            future = asyncio.get_running_loop().create_future()
            future.set_result(error)
            return future
        return self._batcher.submit(
            image,
            lane,
            deadline=deadline,
            memory=memory,
            size=count_results(image),
            caller=caller,
            convert=convert,
        )

    def _count_image(
        self, outcome: Answer | BoxAnswers | Exception, model: LiveModel, job: Job, on_answer: AnswerCallback
    ) -> None:
        """Count an image in the record, the metrics and the statistics, and keep it for the next shadow test.

        Never raises, so that the caller gets its answer in any case.
        """
        try:
            on_answer(outcome, job)
            if isinstance(outcome, Answer):
                self._prediction_tallies[model].add_image(outcome, job)
                if recent := self._recent_images.get(model.name):
                    recent.add_image(job.item)
            elif isinstance(outcome, BoxAnswers):  # a shadow test would classify the whole image
                self._prediction_tallies[model].add_boxes(outcome, job)
        except Exception:
            log.exception("an answer of model %s could not be counted", model.name)

    def require_ready(self) -> None:
        """Raise `NotReady` if there is no runner, or no model although models are expected."""
        if not self.runners.alive_count:
            raise NotReady("all runners have died; others are being started", retry_after=1.0)
        if self.catalog.is_waiting:
            raise NotReady("no model is loaded; the log says why", retry_after=1.0)

    def require_alive(self) -> None:
        """Raise `NotReady` if there has been no runner for longer than `runner_absence` seconds.

        The liveness probe then fails, so that the service is restarted.
        """
        limit = self.settings.runner_absence
        if limit and self.runners.absence_seconds > limit:
            raise NotReady(
                f"there has been no runner for {self.runners.absence_seconds:.0f} s; the limit is "
                f"{limit:g} s (FOVEA_RUNNER_ABSENCE); restart the service",
                retry_after=1.0,
            )

    def check_capacity(self, model: LiveModel, count: int = 1) -> None:
        """Raise `Overloaded` unless there are places for `count` images of a model.

        Half of all places are divided evenly among the models and reserved for them. The other half is
        available to any model.
        """
        limit = self.settings.queue_images
        if self.images_in_flight + count > limit:
            raise self.create_overload_error(f"at most {limit} images may be in flight (FOVEA_QUEUE_IMAGES)")
        model_limit = model.model_version.config.queue_images
        if model_limit is not None and model.images_in_flight + count > model_limit:
            raise self.create_overload_error(
                f"at most {model_limit} images of this model may be in flight (its queue_images)"
            )
        if 2 * (self.images_in_flight + count) > limit:
            models = self.catalog.models
            fair_share = limit // (2 * max(1, len(models)))
            other_reserve = sum(
                max(0, fair_share - other.images_in_flight) for other in models if other is not model
            )
            if (
                model.images_in_flight + count > fair_share
                and self.images_in_flight + count > limit - other_reserve
            ):
                raise self.create_overload_error(
                    f"the last {other_reserve} places in the queue are reserved for other models "
                    "(FOVEA_QUEUE_IMAGES)"
                )

    def create_overload_error(self, message: str) -> Overloaded:
        """Return an `Overloaded` error with the estimated time to finish all images in flight."""
        return Overloaded(message, retry_after=self._batcher.drain_seconds(self.images_in_flight))


def _convert_outcome(
    outcome: Answer | BaseException, model: LiveModel
) -> Classification | RequestError | BaseException:
    """Convert the batcher's outcome of an image."""
    if isinstance(outcome, Answer):
        return Classification(model, outcome)
    if isinstance(outcome, RunnerLost):
        log.error("an image is given up: %s", outcome)
        return Internal("two processes died while they worked on this image")
    return outcome


def _estimate_box_seconds(boxes: Sequence[PixelBox], model: LiveModel) -> float:
    """Return the time of a runner for boxes, in seconds, by the measured time of an image that decodes fast.

    More boxes than one batch never count as cheap, even before the first measurement.
    """
    lane = model.lanes[0]
    seconds = len(boxes) * lane.seconds_per_item
    return max(seconds, _LEVEL_SECONDS[0]) if len(boxes) > lane.batch_max else seconds


def _check_outcome(
    outcome: Classification | BoxClassification | RequestError | BaseException,
) -> Classification | BoxClassification | RequestError:
    """Return an outcome that belongs to one image, and raise any other outcome."""
    if isinstance(outcome, Unavailable):  # this error concerns the whole request
        raise outcome
    if isinstance(outcome, Classification | BoxClassification | RequestError):
        return outcome
    raise outcome
