"""What one model has done since it was loaded, in this worker."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fovea.service.runners.batcher import Job
from fovea.service.runners.messages import Answer


@dataclass(slots=True)
class Sum:
    """How often, and how long together, in seconds."""

    count: float = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: float = 1) -> None:
        """So often more; `seconds` are of all of them."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class Tally:
    """Of requests and of images."""

    succeeded: Sum = field(default_factory=Sum)
    """Requests, from the moment when their images were put in line."""
    failed: Sum = field(default_factory=Sum)
    queue: Sum = field(default_factory=Sum)
    """Of each image that was answered, as the next two are."""
    decode: Sum = field(default_factory=Sum)
    inference: Sum = field(default_factory=Sum)
    """The model call that an image was in."""
    calls: dict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    """Model calls, by the number of images in them: each image counts for its share of one."""
    last: float = 0.0
    """When an image was last answered, on the monotonic clock, in seconds; 0: never."""

    def request(self, began: float, *, succeeded: bool) -> None:
        """One is answered, that began at `began` on the monotonic clock."""
        (self.succeeded if succeeded else self.failed).add(time.monotonic() - began)

    def image(self, answer: Answer, job: Job) -> None:
        """One is answered."""
        work = answer.work
        self.queue.add(job.begun - job.since)
        self.decode.add(work.decode)
        self.inference.add(work.inference)
        self.calls[work.batch].add(work.inference / work.batch, 1 / work.batch)
        self.last = time.monotonic()
