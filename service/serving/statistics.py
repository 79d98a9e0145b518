"""Statistics of one model since it was loaded, for this worker."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fovea.service.runners.batch_messages import Answer
from fovea.service.runners.lane import Job


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

    def count_image(self, answer: Answer, job: Job) -> None:
        """Count an answered image."""
        work = answer.timing
        self.queue.add(job.started_at - job.arrived_at)
        self.decode.add(work.decode_seconds)
        self.inference.add(work.inference_seconds)
        self.model_calls[work.batch_size].add(work.inference_seconds / work.batch_size, 1 / work.batch_size)
        self.last_answer_at = time.monotonic()
