"""The services that all endpoints share: models, admission, time limits and stage times."""

from __future__ import annotations

from typing import Final, NamedTuple

from fovea.service.access.access_control import AccessControl
from fovea.service.access.caller_limits import CallerReservation, QuestionPlaces
from fovea.service.api.url_images import UrlImages
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest, DeadlineExceeded
from fovea.service.explain.client import MAX_WAITING_QUESTIONS, ExplainerClient
from fovea.service.http.fast_path import Headers
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer
from fovea.service.http.request_record import RequestRecord
from fovea.service.rollout.manager import ModelManager
from fovea.service.runners.lane import INFINITY
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings

MAX_INLINE_LABELS: Final = 200
"""Maximum number of labels that the event loop renders in one reply. Each label takes 2 to 10 us, including
its share of the rest."""


_GREY_IMAGE: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAAAAABWESUoAAAAFklEQVR42mNoIAAYRhWMKhhVMFIVAABC"
    "AAAfN5c2AAAAAABJRU5ErkJggg=="
)
"""A grey PNG of 32 x 32 pixels, base64."""

_MAX_QUOTE_LENGTH: Final = 80
"""Maximum number of bytes of a header that a message quotes."""


class ModelAddress(NamedTuple):
    """The address of a model; no name means the default model, no version means the latest version."""

    name: str | None = None
    version: str | None = None


class Services:
    """The shared services for classification requests of all protocols."""

    def __init__(
        self,
        classifier: Classifier,
        lifecycle: Lifecycle,
        observer: Observer,
        manager: ModelManager,
        heatmap_explainer: ExplainerClient,
        layer_explainer: ExplainerClient,
        url_images: UrlImages,
        access: AccessControl | None = None,
    ) -> None:
        """Collect the services; `heatmap_explainer` computes heat maps, `layer_explainer` opens models.

        `access` has the API keys if the service needs keys.
        """
        self.url_images = url_images
        self.classifier = classifier
        self.lifecycle = lifecycle
        self.observer = observer
        self.manager = manager
        self.heatmap_explainer = heatmap_explainer
        self.layer_explainer = layer_explainer
        self.access = access
        self.question_places = QuestionPlaces(classifier.caller_limits, MAX_WAITING_QUESTIONS)

    @property
    def settings(self) -> Settings:
        """Settings of the service."""
        return self.classifier.settings

    @property
    def example_image(self) -> str:
        """Smallest image of all golden sets, base64; this host is known to decode it.

        If callers need keys, it is a grey image: the examples are open, and golden images may be private.
        """
        if self.access:
            return _GREY_IMAGE
        models = self.classifier.catalog.models
        images = [golden.image for model in models for golden in model.contract.golden.images]
        return min(images, key=len, default="")

    def require_ready(self) -> None:
        """Raise `Unavailable` if no runner can answer or the service is about to stop."""
        self.lifecycle.require_ready()
        self.classifier.require_ready()

    async def get_model(self, name: str, version: str | None = None) -> LiveModel:
        """Return a model for questions about the model itself, and load it if necessary.

        Raises `RequestError`.
        """
        model = self.classifier.catalog.get(name, version)
        if isinstance(model, ModelVersion):
            model = await self.manager.load_on_demand(name, version)
            model.release()  # the caller does not wait before it reads the model, or acquires it itself
        return model

    def admit(self, name: str | None, version: str | None, record: RequestRecord) -> LiveModel | ModelVersion:
        """Admit a request, and return its model, or the file that must be loaded first.

        Raises `RequestError`.
        """
        # First, so that the log names the model of a refused request.
        model = self.classifier.catalog.get(name, version)
        if isinstance(model, LiveModel):
            self._record_model(model, record)
        else:
            record.model, record.version = model.name or "", model.version or ""
        self.lifecycle.require_accepting()
        return model

    def _record_model(self, model: LiveModel, record: RequestRecord) -> None:
        record.model, record.version = model.name, model.version
        model.last_used = record.started_at

    async def create_admission(
        self,
        address: ModelAddress,
        model: LiveModel | ModelVersion,
        record: RequestRecord,
        caller: CallerReservation | None = None,
    ) -> Admission:
        """Return the admission of a request, and load its model first if necessary.

        `caller` is the reservation of a request that has one already. Raises `RequestError`.
        """
        if isinstance(model, LiveModel):
            self.classifier.check_capacity(model)
            return Admission(self.classifier, model, caller or self.reserve_caller(record))
        caller = caller or self.reserve_caller(record)  # first: a request that waits for a model counts
        try:
            live_model = await self.manager.load_on_demand(*address)
            try:
                self._record_model(live_model, record)
                self.classifier.check_capacity(live_model)
                return Admission(self.classifier, live_model, caller)
            finally:
                # `load_on_demand` has acquired the model. Release it only now that the admission has its own
                # reference; the model could otherwise be unloaded in between.
                live_model.release()
        except BaseException:
            if caller:
                caller.release()
            raise

    def reserve_caller(self, record: RequestRecord) -> CallerReservation | None:
        """Count a request against the limits of its caller; None if there are no limits.

        The result belongs to an `Admission`, which releases it. Raises `CallerLimited`.
        """
        limits = self.classifier.caller_limits
        return limits.reserve(record.caller) if limits else None

    def end_stage(self, stage: str, started_at: float, record: RequestRecord) -> None:
        """Record that a stage of a request ends now.

        The stage began at `started_at`, in seconds of the monotonic clock.
        """
        self.classifier.metrics.seconds_by_stage[stage].observe(record.add_stage(stage, started_at))


def parse_time_limit(headers: Headers, settings: Settings) -> float | None:
    """Return the time limit for the answer in seconds, or None if there is no limit.

    Raises `BadRequest`.
    """
    value = headers.get(b"x-deadline-ms")
    if value is None:
        return settings.deadline_ms / 1000 or None
    try:
        limit = float(value) / 1000
    except ValueError:
        limit = 0.0
    if not 0 < limit < INFINITY:
        quoted_value = repr(value[:_MAX_QUOTE_LENGTH].decode("latin-1"))
        raise BadRequest(f"X-Deadline-Ms is {quoted_value}; it must be a positive number of milliseconds")
    return limit


def make_deadline_error(limit: float | None) -> DeadlineExceeded:
    """Return the error for a request that was not answered within `limit` seconds."""
    return DeadlineExceeded(f"the request was not answered within {limit or 0:g} s (X-Deadline-Ms)")
