"""Judgement of the clients' records and the service's counts under killed and stopped processes.

The functions depend on records alone, so that tests can give each check a case that it must find. Times are
monotonic, in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fovea.bench.chaos.faults import NOTICE_SECONDS, RECOVERY_SECONDS, FaultLog

SLACK_SECONDS: Final = 3.0
"""Allowed delay of an answer after its limit, in seconds; the clients share two busy processors."""

RESTART_SECONDS: Final = 10.0
"""Delay of an answer for each killed or stopped runner, in seconds, because another runner must start."""

_MAX_SENTENCES: Final = 12
"""Maximum number of sentences about requests that are printed; the others are counted."""


@dataclass(frozen=True)
class ClientRequest:
    """One request as its client saw it."""

    kind: str
    route: str
    """Template of the route, as in the service's metrics."""
    sent_at: float
    ended_at: float
    limit: float
    """Time limit for any answer, in seconds."""
    allowed_statuses: frozenset[int] = frozenset({200})
    """Statuses that are right without a fault."""
    deadline: float | None = None
    """Deadline of the request, in seconds."""
    model: str = ""
    """Name of the requested model if it may be unloaded."""
    is_explanation: bool = False
    images: int = 1
    status: int = 0
    """Status of the answer; 0 without an answer."""
    codes: tuple[str, ...] = ()
    """Error codes of the answer: of the request, or of some of its images."""
    text: str = ""
    """Start of an error answer."""
    answer_count: int = 0
    """Number of images with labels, and of explanations."""
    idle_seconds: float = 0.0
    """Idle time of the connection before the request, in seconds; it may have broken unnoticed."""
    failure_reason: str = ""
    """Reason for a missing answer; empty if there was an answer or the client left."""
    mistake: str = ""
    """Difference between the answer and the expectation."""
    has_left: bool = False
    """Flag for a client that deliberately left before the answer."""

    @property
    def seconds(self) -> float:
        """Duration of the request, in seconds."""
        return self.ended_at - self.sent_at


# --- single requests -----------------------------------------------------------------------------


def find_complaint(request: ClientRequest, faults: FaultLog, client_lag: float = 0.0) -> str:
    """Return a description of a wrong outcome of a request; empty if the outcome is right.

    `client_lag` is the delay of the client itself meanwhile, in seconds.
    """
    if request.has_left:
        return ""
    if request.mistake:
        return f"wrong: {request.mistake}"
    worker_faults = faults.find_overlapping(request.sent_at, request.ended_at, "worker")
    if not request.status:
        excuses = worker_faults or faults.find_overlapping(
            request.sent_at - request.idle_seconds, request.ended_at, "worker"
        )
        return "" if excuses else f"lost: {request.failure_reason}"
    excused_seconds = (
        sum(max(0.0, one.overlap(request.sent_at, request.ended_at)) for one in worker_faults) + client_lag
    )
    excused_seconds += RESTART_SECONDS * len(
        faults.find_overlapping(request.sent_at - NOTICE_SECONDS, request.ended_at, "runner")
    )
    if request.seconds > request.limit + SLACK_SECONDS + excused_seconds:
        return f"late: {request.status} after {request.seconds:.1f} s; at most {request.limit:.1f} s"
    return _find_status_complaint(request, faults, worker_faulty=bool(worker_faults))


def _find_status_complaint(request: ClientRequest, faults: FaultLog, *, worker_faulty: bool) -> str:
    status, code = request.status, request.text or ", ".join(request.codes)
    if status in request.allowed_statuses:
        if status != 200 or not request.codes:
            return ""
        is_late = request.deadline is not None and set(request.codes) == {"deadline_exceeded"}
        return (
            ""
            if is_late or _is_failure_excused(request, faults)
            else f"failed: 200 that contains errors: {code}"
        )
    if status == 504 and request.deadline is not None:
        early_seconds = request.deadline - request.seconds
        return "" if early_seconds < 0.01 else f"wrong: 504 {early_seconds:.3f} s before the deadline"
    recent_faults = faults.find_overlapping(
        request.sent_at - RECOVERY_SECONDS, request.ended_at, "runner", "worker"
    )
    if status == 503 and (recent_faults or request.is_explanation):
        return ""
    if (
        status == 404
        and request.model
        and faults.find_overlapping(request.sent_at, request.ended_at, request.model)
    ):
        return ""
    if status == 500 and _is_failure_excused(request, faults):
        return ""
    if status == 408 and worker_faulty:
        return ""
    return f"{'refused' if status == 503 else 'failed'}: {status} {code}"


def _is_failure_excused(request: ClientRequest, faults: FaultLog) -> bool:
    """Return whether faults excuse a failure.

    An explanation may be refused when its process is killed, and must not fail. An image is lost with the
    second runner that dies while holding it.
    """
    start, end = request.sent_at - NOTICE_SECONDS, request.ended_at
    if request.is_explanation:
        return set(request.codes) == {"not_ready"} and bool(faults.find_overlapping(start, end, "explainer"))
    return (
        len(faults.find_overlapping(start, end, "runner"))
        + 2 * len(faults.find_overlapping(start, end, "worker"))
        >= 2
    )


# --- all requests --------------------------------------------------------------------------------


@dataclass
class RouteCounts:
    """The counts of one route."""

    requests: int = 0
    leavers: int = 0
    lost_requests: int = 0
    doubtful_requests: int = 0
    """Number of left requests that a killed worker may never have seen."""
    statuses: Counter[int] = field(default_factory=Counter)


class RequestLog:
    """The record of all requests, which keeps unusual requests until all faults are known."""

    MAX_REQUESTS: Final = 50_000
    """Maximum number of kept requests; exceeding it is a failure of its own."""

    def __init__(self) -> None:
        self.routes: dict[str, RouteCounts] = {}
        self.codes: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        """Number of requests by kind and outcome."""
        self.images = 0
        """Number of images that were answered with labels."""
        self.uncertain_images = 0
        """Number of images that may have been classified although their client did not see that."""
        self.explanations = 0
        self.uncertain_explanations = 0
        self.longest_seconds: dict[str, float] = {}
        """Longest duration of each kind, in seconds."""
        self._leavers: list[ClientRequest] = []
        self._suspects: list[tuple[ClientRequest, float]] = []
        self._dropped_count = 0

    def add(self, request: ClientRequest, client_lag: float = 0.0) -> None:
        """Count a request; see `find_complaint` for `client_lag`."""
        count = self.routes.setdefault(request.route, RouteCounts())
        count.requests += 1
        count.leavers += request.has_left
        count.lost_requests += not request.status and not request.has_left
        if request.status:
            count.statuses[request.status] += 1
        self.codes.update(request.codes)
        if request.is_explanation:
            self.explanations += request.answer_count
            self.uncertain_explanations += 1 - request.answer_count
        else:
            self.images += request.answer_count
            self.uncertain_images += request.images - request.answer_count
        outcome = "left" if request.has_left else str(request.status) if request.status else "lost"
        self.kinds[request.kind, outcome] += 1
        if not request.has_left:
            self.longest_seconds[request.kind] = max(
                self.longest_seconds.get(request.kind, 0.0), request.seconds
            )
        if request.has_left and len(self._leavers) < self.MAX_REQUESTS:
            self._leavers.append(request)
        if find_complaint(request, FaultLog(), client_lag):  # without any fault as an excuse
            if len(self._suspects) < self.MAX_REQUESTS:
                self._suspects.append((request, client_lag))
            else:
                self._dropped_count += 1

    def find_complaints(self, faults: FaultLog) -> list[str]:
        """Return a sentence for each kind of wrong outcome, with the first example."""
        requests_by_complaint: dict[tuple[str, str], list[tuple[ClientRequest, str]]] = {}
        for request, client_lag in self._suspects:
            if text := find_complaint(request, faults, client_lag):
                requests_by_complaint.setdefault((request.kind, text.partition(":")[0]), []).append(
                    (request, text)
                )
        first_sent_at = min((one.sent_at for one, _ in self._suspects), default=0.0)
        sentences = [
            f"{len(those)} x {kind}, {text}; the first {those[0][0].sent_at - first_sent_at:.1f} s "
            "after the first suspicious request"
            for (kind, _), those in requests_by_complaint.items()
            for text in [those[0][1]]
        ]
        if self._dropped_count:
            sentences.append(
                f"{self._dropped_count} suspicious requests were not judged; "
                f"at most {self.MAX_REQUESTS} are kept"
            )
        return sentences[:_MAX_SENTENCES] + (
            [f"and {len(sentences) - _MAX_SENTENCES} more kinds"] if len(sentences) > _MAX_SENTENCES else []
        )

    def count_doubtful(self, faults: FaultLog) -> None:
        """Count the left requests that a killed worker may never have seen; all faults are known now."""
        for request in self._leavers:
            if faults.find_overlapping(request.sent_at, request.ended_at + NOTICE_SECONDS, "worker"):
                self.routes[request.route].doubtful_requests += 1

    @property
    def excused_count(self) -> int:
        """Number of requests whose outcome would have been different without faults."""
        return len(self._suspects) + self._dropped_count


# --- the service's counts ------------------------------------------------------------------------


@dataclass(frozen=True)
class ServiceCounts:
    """The service's counts for a period."""

    requests: Mapping[tuple[str, int], int]
    """Number of requests by route and status."""
    errors: Mapping[str, int]
    """Number of errors by reason."""
    images: int
    explanations: int


def find_miscounts(record: RequestLog, service_counts: ServiceCounts, *, stray_count: int = 0) -> list[str]:
    """Return the unexplained differences between the service's counts and the clients' counts.

    Requests in a killed process may be missing, and requests of clients that left may have been answered.
    `stray_count` is the number of unrecorded requests that may have met an error.
    """
    miscounts = []
    for route, count in sorted(record.routes.items()):
        statuses = {
            status: number for (name, status), number in service_counts.requests.items() if name == route
        }
        unknown_count = count.leavers + count.lost_requests
        min_count = count.requests - count.lost_requests - count.doubtful_requests
        miscounts += _describe_miscount(
            f"{route}: requests", sum(statuses.values()), min_count, count.requests
        )
        for status in sorted({0, *statuses, *count.statuses}):
            min_count = count.statuses[status]
            miscounts += _describe_miscount(
                f"{route}: status {status}", statuses.get(status, 0), min_count, min_count + unknown_count
            )
    unknown_count = stray_count + sum(count.leavers + count.lost_requests for count in record.routes.values())
    for reason in sorted({*service_counts.errors, *record.codes}):
        min_count = record.codes[reason]
        miscounts += _describe_miscount(
            f"errors {reason}", service_counts.errors.get(reason, 0), min_count, min_count + unknown_count
        )
    images, explanations = record.images, record.explanations
    miscounts += _describe_miscount("images", service_counts.images, images, images + record.uncertain_images)
    max_count = explanations + record.uncertain_explanations
    return miscounts + _describe_miscount(
        "explanations", service_counts.explanations, explanations, max_count
    )


def _describe_miscount(name: str, count: int, min_count: int, max_count: int) -> list[str]:
    if min_count <= count <= max_count:
        return []
    expected = str(min_count) if min_count == max_count else f"{min_count} to {max_count}"
    return [f"metrics: {name}: {count} counted by the service, {expected} by its clients"]
