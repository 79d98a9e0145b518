"""Judgement of the clients' records and the service's counts under killed and stopped processes.

All functions depend on records alone, so that tests can give each check a case that it must find. Times are
monotonic, in seconds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

SLACK_SECONDS: Final = 3.0
"""Allowed delay of an answer after its limit, in seconds; the clients share two busy processors."""

NOTICE_SECONDS: Final = 2.0
"""Time after a kill within which clients notice it, in seconds; the end of a process takes a moment."""

RECOVERY_SECONDS: Final = 20.0
"""Time after a fault within which a request may be refused with 503, in seconds.

A runner starts in two seconds, but its start is put off by up to 8 s if it was killed while loading, and
others may be killed meanwhile.
"""

RESTART_SECONDS: Final = 10.0
"""Delay of an answer for each killed or stopped runner, in seconds, because another runner must start."""

MAX_RISE: Final = 0.05
"""Maximum growth of the memory as a share, from the trend under load and between two rests."""

_MAX_IDLE_GROWTH: Final = 48 << 20
"""Maximum growth of the memory at rest, in bytes, for all processes and for the first one.

The limit covers the last images of two models, 16 MB each (FOVEA_REPLAY_IMAGES), and a heap of 16 MB that is
kept from a large request. A small leak shows in the trend.
"""

_WARM_SECONDS: Final = 90.0
"""Time under load until processes have the blocks that they keep for large images, in seconds.

The blocks have 64 MB each (PILLOW_BLOCKS_MAX). Before that time, growth at rest means nothing.
"""

_TREND_SECONDS: Final = 240.0
"""Minimum time for a trend, in seconds; in a shorter time, a one-time allocation would look like a trend."""

_MAX_FILE_GROWTH: Final = 8
"""Maximum growth of the number of open files at rest."""

_BLOCK_COUNT: Final = 12
"""Number of blocks of time whose median memory the trend is fitted to; single samples are correlated."""

_WARM_UP_SHARE: Final = 0.25
"""Share of the time at the start that the trend leaves out."""

_MAX_SENTENCES: Final = 12
"""Maximum number of sentences about requests that are printed; the others are counted."""


@dataclass
class Fault:
    """A deliberate fault of a process or a model."""

    target: str
    """`runner`, `worker` or `explainer`, or the name of an unloaded model."""
    kind: str
    """`killed`, `stopped` or `unloaded`."""
    began_at: float
    ended_at: float = float("inf")
    """Time at which the fault stops affecting later requests."""

    def overlap(self, start: float, end: float) -> float:
        """Return the overlap with a period in seconds; negative without an overlap."""
        return min(self.ended_at, end) - max(self.began_at, start)


class FaultLog:
    """The collection of all faults."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = list(faults)

    def add(self, fault: Fault) -> Fault:
        """Record a fault that begins, and return it."""
        self._faults.append(fault)
        return fault

    def find_overlapping(self, start: float, end: float, *targets: str) -> list[Fault]:
        """Return the faults of these targets that overlap with the period."""
        return [one for one in self._faults if one.target in targets and one.overlap(start, end) >= 0]

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults)

    @property
    def counts(self) -> Counter[str]:
        """Number of faults by description."""
        return Counter(f"{one.target} {one.kind}" for one in self._faults)


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
            else f"failed: 200 with errors inside, {code}"
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

    An explanation is lost with its process, an image with the second runner that dies while holding it.
    """
    start, end = request.sent_at - NOTICE_SECONDS, request.ended_at
    if request.is_explanation:
        return bool(faults.find_overlapping(start, end, "explainer", "worker"))
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
            "after the first that needed an excuse"
            for (kind, _), those in requests_by_complaint.items()
            for text in [those[0][1]]
        ]
        if self._dropped_count:
            sentences.append(
                f"{self._dropped_count} requests more needed an excuse than are kept ({self.MAX_REQUESTS})"
            )
        return sentences[:_MAX_SENTENCES] + (
            [f"and {len(sentences) - _MAX_SENTENCES} kinds more"] if len(sentences) > _MAX_SENTENCES else []
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


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trend:
    """The change of the memory over the measured time, as a share of its mean."""

    rise: float
    error: float
    """Twice the standard error."""

    def __str__(self) -> str:
        if self == Trend(0.0, 0.0):
            return "unknown, the time was too short"
        return f"{self.rise:+.1%} ± {self.error:.1%}"


def fit_trend(points: Sequence[tuple[float, int]]) -> Trend:
    """Fit a line to times (seconds) and bytes; a short period has no trend."""
    start = points[0][0] + _WARM_UP_SHARE * (points[-1][0] - points[0][0]) if points else 0.0
    late_points = [(second, size) for second, size in points if second >= start]
    if len(late_points) < 2 * _BLOCK_COUNT or late_points[-1][0] - late_points[0][0] < _TREND_SECONDS:
        return Trend(0.0, 0.0)
    blocks = [
        late_points[len(late_points) * one // _BLOCK_COUNT : len(late_points) * (one + 1) // _BLOCK_COUNT]
        for one in range(_BLOCK_COUNT)
    ]
    times = [statistics.fmean(second for second, _ in block) for block in blocks]
    sizes = [statistics.median(size for _, size in block) for block in blocks]
    line = statistics.linear_regression(times, sizes)
    residuals = [
        size - line.intercept - line.slope * second for second, size in zip(times, sizes, strict=True)
    ]
    time_variance = sum((second - statistics.fmean(times)) ** 2 for second in times)
    error = (sum(one * one for one in residuals) / (_BLOCK_COUNT - 2) / time_variance) ** 0.5
    share = (times[-1] - times[0]) / statistics.fmean(sizes)
    return Trend(line.slope * share, 2 * error * share)


@dataclass(frozen=True)
class IdleState:
    """The service without requests."""

    resident_bytes: int
    """Memory of all processes, in bytes."""
    main_bytes: int
    """Memory of the first process, in bytes: the service itself, or the supervisor of its workers."""
    open_files: int


def find_leaks(
    state_before: IdleState, state_after: IdleState, *curves: Sequence[tuple[float, int]]
) -> list[str]:
    """Return a sentence for each growth; the curves are those of all processes and of the first one."""
    growths = []
    for name, points in zip(("memory", "memory of the first process"), curves, strict=False):
        if (memory_trend := fit_trend(points)).rise - memory_trend.error > MAX_RISE:
            growths.append(f"{name}: the trend rises by {memory_trend}; at most {MAX_RISE:.0%}")
    points = curves[0] if curves else ()
    if points and points[-1][0] - points[0][0] < _WARM_SECONDS:
        state_before = replace(
            state_before, resident_bytes=state_after.resident_bytes, main_bytes=state_after.main_bytes
        )
    growth = state_after.resident_bytes - state_before.resident_bytes
    if growth > _MAX_IDLE_GROWTH:
        growths.append(
            f"memory at rest: {state_before.resident_bytes / 1e6:.0f} MB before and "
            f"{state_after.resident_bytes / 1e6:.0f} MB after"
        )
    if state_after.main_bytes - state_before.main_bytes > _MAX_IDLE_GROWTH:
        growths.append(
            f"memory of the first process at rest: {state_before.main_bytes / 1e6:.0f} MB before and "
            f"{state_after.main_bytes / 1e6:.0f} MB after"
        )
    if state_after.open_files - state_before.open_files > _MAX_FILE_GROWTH:
        growths.append(
            f"open files at rest: {state_before.open_files} before and {state_after.open_files} after"
        )
    return growths
