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

SLACK: Final = 3.0
"""Allowed delay of an answer after its limit, in seconds; the clients share two busy processors."""

AFTERMATH: Final = 2.0
"""Time after a kill within which clients notice it, in seconds; the end of a process takes a moment."""

RECOVERY: Final = 20.0
"""Time after a fault within which a request may be refused with 503, in seconds.

A runner starts in two seconds, but its start is put off by up to 8 s if it was killed while loading, and
others may be killed meanwhile.
"""

RESTART: Final = 10.0
"""Delay of an answer for each killed or stopped runner, in seconds, because another runner must start."""

RISE: Final = 0.05
"""Maximum growth of the memory as a share, from the trend under load and between two rests."""

_REST_BYTES: Final = 48 << 20
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

_REST_FILES: Final = 8
"""Maximum growth of the number of open files at rest."""

_BLOCKS: Final = 12
"""Number of blocks of time whose median memory the trend is fitted to; single samples are correlated."""

_WARM_UP: Final = 0.25
"""Share of the time at the start that the trend leaves out."""

_SHOWN: Final = 12
"""Maximum number of sentences about requests that are printed; the others are counted."""


@dataclass
class Fault:
    """A deliberate fault of a process or a model."""

    target: str
    """`runner`, `worker` or `explainer`, or the name of an unloaded model."""
    what: str
    """`killed`, `stopped` or `unloaded`."""
    began: float
    ended: float = float("inf")
    """Time at which the fault stops affecting later requests."""

    def overlap(self, start: float, end: float) -> float:
        """Return the overlap with a period in seconds; negative without an overlap."""
        return min(self.ended, end) - max(self.began, start)


class Faults:
    """The collection of all faults."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = list(faults)

    def add(self, fault: Fault) -> Fault:
        """Record a fault that begins, and return it."""
        self._faults.append(fault)
        return fault

    def during(self, start: float, end: float, *targets: str) -> list[Fault]:
        """Return the faults of these targets that overlap with the period."""
        return [one for one in self._faults if one.target in targets and one.overlap(start, end) >= 0]

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults)

    @property
    def counts(self) -> Counter[str]:
        """Number of faults by description."""
        return Counter(f"{one.target} {one.what}" for one in self._faults)


@dataclass(frozen=True)
class Request:
    """One request as its client saw it."""

    kind: str
    route: str
    """Template of the route, as in the service's metrics."""
    sent: float
    ended: float
    limit: float
    """Time limit for any answer, in seconds."""
    allowed: frozenset[int] = frozenset({200})
    """Statuses that are right without a fault."""
    deadline: float | None = None
    """Deadline of the request, in seconds."""
    model: str = ""
    """Name of the requested model if it may be unloaded."""
    explains: bool = False
    images: int = 1
    status: int = 0
    """Status of the answer; 0 without an answer."""
    codes: tuple[str, ...] = ()
    """Error codes of the answer: of the request, or of some of its images."""
    text: str = ""
    """Start of an error answer."""
    answered: int = 0
    """Number of images with labels, and of explanations."""
    idle: float = 0.0
    """Idle time of the connection before the request, in seconds; it may have broken unnoticed."""
    broken: str = ""
    """Reason for a missing answer; empty if there was an answer or the client left."""
    mistake: str = ""
    """Difference between the answer and the expectation."""
    left: bool = False
    """Flag for a client that deliberately left before the answer."""

    @property
    def seconds(self) -> float:
        """Duration of the request, in seconds."""
        return self.ended - self.sent


# --- single requests -----------------------------------------------------------------------------


def complaint(request: Request, faults: Faults, lag: float = 0.0) -> str:
    """Return a description of a wrong outcome of a request; empty if the outcome is right.

    `lag` is the delay of the client itself meanwhile, in seconds.
    """
    if request.left:
        return ""
    if request.mistake:
        return f"wrong: {request.mistake}"
    workers = faults.during(request.sent, request.ended, "worker")
    if not request.status:
        found = workers or faults.during(request.sent - request.idle, request.ended, "worker")
        return "" if found else f"lost: {request.broken}"
    excused = sum(max(0.0, one.overlap(request.sent, request.ended)) for one in workers) + lag
    excused += RESTART * len(faults.during(request.sent - AFTERMATH, request.ended, "runner"))
    if request.seconds > request.limit + SLACK + excused:
        return f"late: {request.status} after {request.seconds:.1f} s; at most {request.limit:.1f} s"
    return _complaint_of_status(request, faults, stopped=bool(workers))


def _complaint_of_status(request: Request, faults: Faults, *, stopped: bool) -> str:
    status, code = request.status, request.text or ", ".join(request.codes)
    if status in request.allowed:
        if status != 200 or not request.codes:
            return ""
        late = request.deadline is not None and set(request.codes) == {"deadline_exceeded"}
        return "" if late or _may_fail(request, faults) else f"failed: 200 with errors inside, {code}"
    if status == 504 and request.deadline is not None:
        early = request.deadline - request.seconds
        return "" if early < 0.01 else f"wrong: 504 {early:.3f} s before the deadline"
    recovering = faults.during(request.sent - RECOVERY, request.ended, "runner", "worker")
    if status == 503 and (recovering or request.explains):
        return ""
    if status == 404 and request.model and faults.during(request.sent, request.ended, request.model):
        return ""
    if status == 500 and _may_fail(request, faults):
        return ""
    if status == 408 and stopped:
        return ""
    return f"{'refused' if status == 503 else 'failed'}: {status} {code}"


def _may_fail(request: Request, faults: Faults) -> bool:
    """Return whether faults excuse a failure.

    An explanation is lost with its process, an image with the second runner that dies while holding it.
    """
    start, end = request.sent - AFTERMATH, request.ended
    if request.explains:
        return bool(faults.during(start, end, "explainer", "worker"))
    return len(faults.during(start, end, "runner")) + 2 * len(faults.during(start, end, "worker")) >= 2


# --- all requests --------------------------------------------------------------------------------


@dataclass
class Count:
    """The counts of one route."""

    sent: int = 0
    left: int = 0
    lost: int = 0
    doubtful: int = 0
    """Number of left requests that a killed worker may never have seen."""
    statuses: Counter[int] = field(default_factory=Counter)


class Record:
    """The record of all requests, which keeps unusual requests until all faults are known."""

    MOST: Final = 50_000
    """Maximum number of kept requests; exceeding it is a failure of its own."""

    def __init__(self) -> None:
        self.routes: dict[str, Count] = {}
        self.codes: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        """Number of requests by kind and outcome."""
        self.images = 0
        """Number of images that were answered with labels."""
        self.uncertain_images = 0
        """Number of images that may have been classified although their client did not see that."""
        self.explanations = 0
        self.uncertain_explanations = 0
        self.longest: dict[str, float] = {}
        """Longest duration of each kind, in seconds."""
        self._leavers: list[Request] = []
        self._suspects: list[tuple[Request, float]] = []
        self._unkept = 0

    def add(self, request: Request, lag: float = 0.0) -> None:
        """Count a request; see `complaint` for `lag`."""
        count = self.routes.setdefault(request.route, Count())
        count.sent += 1
        count.left += request.left
        count.lost += not request.status and not request.left
        if request.status:
            count.statuses[request.status] += 1
        self.codes.update(request.codes)
        if request.explains:
            self.explanations += request.answered
            self.uncertain_explanations += 1 - request.answered
        else:
            self.images += request.answered
            self.uncertain_images += request.images - request.answered
        outcome = "left" if request.left else str(request.status) if request.status else "lost"
        self.kinds[request.kind, outcome] += 1
        if not request.left:
            self.longest[request.kind] = max(self.longest.get(request.kind, 0.0), request.seconds)
        if request.left and len(self._leavers) < self.MOST:
            self._leavers.append(request)
        if complaint(request, Faults(), lag):  # without any fault as an excuse
            if len(self._suspects) < self.MOST:
                self._suspects.append((request, lag))
            else:
                self._unkept += 1

    def complaints(self, faults: Faults) -> list[str]:
        """Return a sentence for each kind of wrong outcome, with the first example."""
        found: dict[tuple[str, str], list[tuple[Request, str]]] = {}
        for request, lag in self._suspects:
            if said := complaint(request, faults, lag):
                found.setdefault((request.kind, said.partition(":")[0]), []).append((request, said))
        first = min((one.sent for one, _ in self._suspects), default=0.0)
        told = [
            f"{len(those)} x {kind}, {said}; the first {those[0][0].sent - first:.1f} s after the first that "
            "needed an excuse"
            for (kind, _), those in found.items()
            for said in [those[0][1]]
        ]
        if self._unkept:
            told.append(f"{self._unkept} requests more needed an excuse than are kept ({self.MOST})")
        return told[:_SHOWN] + ([f"and {len(told) - _SHOWN} kinds more"] if len(told) > _SHOWN else [])

    def find_doubtful(self, faults: Faults) -> None:
        """Count the left requests that a killed worker may never have seen; all faults are known now."""
        for request in self._leavers:
            if faults.during(request.sent, request.ended + AFTERMATH, "worker"):
                self.routes[request.route].doubtful += 1

    @property
    def excused(self) -> int:
        """Number of requests whose outcome would have been different without faults."""
        return len(self._suspects) + self._unkept


# --- the service's counts ------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """The service's counts for a period."""

    requests: Mapping[tuple[str, int], int]
    """Number of requests by route and status."""
    errors: Mapping[str, int]
    """Number of errors by reason."""
    images: int
    explanations: int


def miscounts(record: Record, counted: Counted, *, strays: int = 0) -> list[str]:
    """Return the unexplained differences between the service's counts and the clients' counts.

    Requests in a killed process may be missing, and requests of clients that left may have been answered.
    `strays` is the number of unrecorded requests that may have met an error.
    """
    told = []
    for route, count in sorted(record.routes.items()):
        statuses = {status: number for (name, status), number in counted.requests.items() if name == route}
        unknown = count.left + count.lost
        least = count.sent - count.lost - count.doubtful
        told += _outside(f"{route}: requests", sum(statuses.values()), least, count.sent)
        for status in sorted({0, *statuses, *count.statuses}):
            least = count.statuses[status]
            told += _outside(f"{route}: status {status}", statuses.get(status, 0), least, least + unknown)
    unknown = strays + sum(count.left + count.lost for count in record.routes.values())
    for reason in sorted({*counted.errors, *record.codes}):
        least = record.codes[reason]
        told += _outside(f"errors {reason}", counted.errors.get(reason, 0), least, least + unknown)
    images, explanations = record.images, record.explanations
    told += _outside("images", counted.images, images, images + record.uncertain_images)
    most = explanations + record.uncertain_explanations
    return told + _outside("explanations", counted.explanations, explanations, most)


def _outside(name: str, counted: int, least: int, most: int) -> list[str]:
    if least <= counted <= most:
        return []
    wanted = str(least) if least == most else f"{least} to {most}"
    return [f"metrics: {name}: {counted} counted by the service, {wanted} by its clients"]


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


def trend(points: Sequence[tuple[float, int]]) -> Trend:
    """Fit a line to times (seconds) and bytes; a short period has no trend."""
    start = points[0][0] + _WARM_UP * (points[-1][0] - points[0][0]) if points else 0.0
    kept = [(second, size) for second, size in points if second >= start]
    if len(kept) < 2 * _BLOCKS or kept[-1][0] - kept[0][0] < _TREND_SECONDS:
        return Trend(0.0, 0.0)
    blocks = [kept[len(kept) * one // _BLOCKS : len(kept) * (one + 1) // _BLOCKS] for one in range(_BLOCKS)]
    times = [statistics.fmean(second for second, _ in block) for block in blocks]
    sizes = [statistics.median(size for _, size in block) for block in blocks]
    line = statistics.linear_regression(times, sizes)
    rest = [size - line.intercept - line.slope * second for second, size in zip(times, sizes, strict=True)]
    spread = sum((second - statistics.fmean(times)) ** 2 for second in times)
    error = (sum(one * one for one in rest) / (_BLOCKS - 2) / spread) ** 0.5
    share = (times[-1] - times[0]) / statistics.fmean(sizes)
    return Trend(line.slope * share, 2 * error * share)


@dataclass(frozen=True)
class Rest:
    """The service without requests."""

    resident_bytes: int
    """Memory of all processes, in bytes."""
    main_bytes: int
    """Memory of the first process, in bytes: the service itself, or the supervisor of its workers."""
    open_files: int


def leaks(before: Rest, after: Rest, *curves: Sequence[tuple[float, int]]) -> list[str]:
    """Return a sentence for each growth; the curves are those of all processes and of the first one."""
    told = []
    for name, points in zip(("memory", "memory of the first process"), curves, strict=False):
        if (fitted := trend(points)).rise - fitted.error > RISE:
            told.append(f"{name}: the trend rises by {fitted}; at most {RISE:.0%}")
    points = curves[0] if curves else ()
    if points and points[-1][0] - points[0][0] < _WARM_SECONDS:
        before = replace(before, resident_bytes=after.resident_bytes, main_bytes=after.main_bytes)
    grown = after.resident_bytes - before.resident_bytes
    if grown > _REST_BYTES:
        told.append(f"memory at rest: {before.resident_bytes / 1e6:.0f} MB before and "
                    f"{after.resident_bytes / 1e6:.0f} MB after")  # fmt: skip
    if after.main_bytes - before.main_bytes > _REST_BYTES:
        told.append(f"memory of the first process at rest: {before.main_bytes / 1e6:.0f} MB before and "
                    f"{after.main_bytes / 1e6:.0f} MB after")  # fmt: skip
    if after.open_files - before.open_files > _REST_FILES:
        told.append(f"open files at rest: {before.open_files} before and {after.open_files} after")
    return told
