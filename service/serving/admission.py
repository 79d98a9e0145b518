"""Admission of a request: the memory and the places that it reserves until it is answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fovea.service.access.caller_limits import CallerReservation
from fovea.service.errors import BadRequest
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.live_model import LiveModel

_LARGE_BODY_BYTES: Final = 1 << 20
"""Size in bytes above which a body counts as large and must leave room for others."""


_LARGE_BODIES_SHARE: Final = 3 / 4
"""Share of the body memory available to large bodies, so that small bodies are always accepted."""


_LABEL_BYTES: Final = 130
"""Memory in bytes for one label of a JSON answer. The label counts twice, because the answer's parts are
joined."""


class Admission:
    """Memory and places of one request, and a reference to its model.

    Release them by `with` or by calling `release`.
    """

    __slots__ = ("_caller", "_classifier", "_is_released", "_reserved_bytes", "_reserved_images", "model")

    def __init__(
        self, classifier: Classifier, model: LiveModel, caller: CallerReservation | None = None
    ) -> None:
        """Acquire the model. The admission owns the reservation of the `caller`, and releases it."""
        self._classifier = classifier
        self._caller = caller
        self.model = model
        self._reserved_bytes = self._reserved_images = 0
        self._is_released = False
        model.acquire()

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release everything. Further calls do nothing."""
        # The model comes last: its release may unload a draining model, and an error there must not keep
        # memory and places.
        self._classifier.body_memory.release(self._reserved_bytes)
        self._reserved_bytes = 0
        if self._reserved_images:
            self._add_images(-self._reserved_images)
        if self._caller:
            self._caller.release()
        if not self._is_released:
            self._is_released = True
            self.model.release()

    def reserve_bytes(self, size: int) -> None:
        """Reserve `size` more bytes for a body.

        Raises `Overloaded` when all bodies together become too large, or `ShareExceeded` when those of the
        caller do.
        """
        if self._reserved_bytes + size > _LARGE_BODY_BYTES:
            _check_large_body(self._classifier, size)
        self._reserve(size)

    def _reserve(self, size: int) -> None:
        """Reserve `size` bytes, or raise `Overloaded` or `ShareExceeded`."""
        classifier = self._classifier
        if self._caller:
            self._caller.add_bytes(size, classifier.body_memory)
        _reserve_memory(classifier, size)
        if self._is_released:  # `BodyMemory` has cut off this request's own client to make room
            classifier.body_memory.release(size)
        else:
            self._reserved_bytes += size

    def reserve_answer(self, labels: int) -> None:
        """Reserve the memory for creating an answer with `labels` labels.

        Raises `Overloaded`, or `BadRequest` if the answer would exceed the whole limit.
        """
        size, limit = labels * _LABEL_BYTES, self._classifier.body_memory.limit
        if size > limit:
            raise BadRequest(
                f"an answer with {labels} labels takes about {size} bytes, and all bodies together may take "
                f"{limit} (FOVEA_BODIES_BYTES); ask for fewer labels (top_k) or send fewer images"
            )
        self._reserve(size)

    def reserve_images(self, count: int) -> None:
        """Take places for `count` images.

        Raises `Overloaded` at once if there are not enough, `CallerLimited` if its caller may not have as
        many now, or `BadRequest` if its caller may never have as many.
        """
        self._classifier.check_capacity(self.model, count)
        self.count_images(count)
        self._add_images(count)

    def count_images(self, count: int) -> None:
        """Count `count` images in all against the limits of the caller, before they take places.

        Raises `CallerLimited`, or `BadRequest` if the caller may never have as many.
        """
        if self._caller:
            self._caller.extend(count)

    @property
    def queue_name(self) -> str | None:
        """Name under which the images wait in turn with those of other callers; None without turns."""
        return self._caller.queue_name if self._caller else None

    def _add_images(self, images: int) -> None:
        """Change the number of images in flight."""
        self._reserved_images += images
        self._classifier.images_in_flight += images
        self.model.images_in_flight += images


@contextmanager
def hold_body(classifier: Classifier, size: int) -> Iterator[None]:
    """Count the bytes of a received body that has no admission yet, because its model may be loaded first.

    Raises `Overloaded`.
    """
    if size > _LARGE_BODY_BYTES:
        _check_large_body(classifier, size)
    _reserve_memory(classifier, size)
    try:
        yield
    finally:
        classifier.body_memory.release(size)


def _check_large_body(classifier: Classifier, size: int) -> None:
    """Raise `Overloaded` unless there is room for a large body: the last quarter is for small bodies."""
    limit = classifier.body_memory.limit
    large_limit = max(_LARGE_BODIES_SHARE * limit, classifier.settings.body_bytes)
    if classifier.body_memory.body_bytes + size > large_limit:
        raise classifier.create_overload_error(
            f"there is no room for this body: all bodies together may take {limit} bytes, and large "
            f"bodies {large_limit:.0f} of them (FOVEA_BODIES_BYTES)"
        )


def _reserve_memory(classifier: Classifier, size: int) -> None:
    if not classifier.body_memory.reserve(size):
        limit = classifier.body_memory.limit
        raise classifier.create_overload_error(
            f"there is no room for this request: all bodies together may take {limit} bytes "
            "(FOVEA_BODIES_BYTES)"
        )
