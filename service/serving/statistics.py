"""Statistics of one model since it was loaded, for this worker."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fovea.service.runners.batch_messages import ImageTiming


@dataclass(slots=True)
class DurationSum:
    """Number of events and their total duration in seconds."""

    count: float = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: float = 1) -> None:
        """Add `count` events that took `seconds` in total."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Statistics of a model's requests and images."""

    succeeded_requests: DurationSum = field(default_factory=DurationSum)
    """Requests that succeeded. Their time starts when their images are queued."""
    failed_requests: DurationSum = field(default_factory=DurationSum)
    """Requests that failed, measured like `succeeded_requests`."""
    queue: DurationSum = field(default_factory=DurationSum)
    """Queue time of each answered image."""
    decode: DurationSum = field(default_factory=DurationSum)
    """Decode time of each answered image."""
    inference: DurationSum = field(default_factory=DurationSum)
    """Duration of the model call of each answered image."""
    model_calls: dict[int, DurationSum] = field(default_factory=lambda: defaultdict(DurationSum))
    """Model calls by batch size. Each image counts for its share of a call."""
    last_answer_at: float = 0.0
    """Time of the last answered image on the monotonic clock in seconds; 0 if there was none."""

    def count_request(self, started_at: float, *, is_success: bool) -> None:
        """Count a finished request that began at `started_at` on the monotonic clock."""
        (self.succeeded_requests if is_success else self.failed_requests).add(time.monotonic() - started_at)

    def count_image(self, queue_seconds: float, timing: ImageTiming, answered_at: float) -> None:
        """Count an image that was answered at `answered_at` on the monotonic clock."""
        self.queue.add(queue_seconds)
        self.decode.add(timing.decode_seconds)
        self.inference.add(timing.inference_seconds)
        size = timing.batch_size
        self.model_calls[size].add(timing.inference_seconds / size, 1 / size)
        self.last_answer_at = answered_at
