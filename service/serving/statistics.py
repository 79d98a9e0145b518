"""Statistics of one model since it was loaded, for this worker."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fovea.service.runners.batcher import Job
from fovea.service.runners.messages import Answer


@dataclass(slots=True)
class Sum:
    """Number of events and their total duration in seconds."""

    count: float = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: float = 1) -> None:
        """Add `count` events that took `seconds` in total."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class Tally:
    """Statistics of a model's requests and images."""

    succeeded: Sum = field(default_factory=Sum)
    """Requests that succeeded. Their time starts when their images are queued."""
    failed: Sum = field(default_factory=Sum)
    """Requests that failed, measured like `succeeded`."""
    queue: Sum = field(default_factory=Sum)
    """Queue time of each answered image."""
    decode: Sum = field(default_factory=Sum)
    """Decode time of each answered image."""
    inference: Sum = field(default_factory=Sum)
    """Duration of the model call of each answered image."""
    calls: dict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    """Model calls by batch size. Each image counts for its share of a call."""
    last: float = 0.0
    """Time of the last answered image on the monotonic clock in seconds; 0 if there was none."""

    def request(self, began: float, *, succeeded: bool) -> None:
        """Count a finished request that began at `began` on the monotonic clock."""
        (self.succeeded if succeeded else self.failed).add(time.monotonic() - began)

    def image(self, answer: Answer, job: Job) -> None:
        """Count an answered image."""
        work = answer.timing
        self.queue.add(job.started_at - job.arrived_at)
        self.decode.add(work.decode_seconds)
        self.inference.add(work.inference_seconds)
        self.calls[work.batch_size].add(work.inference_seconds / work.batch_size, 1 / work.batch_size)
        self.last = time.monotonic()
