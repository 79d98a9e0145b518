"""What a model may answer at any time, and the judgement of finished requests.

Times are monotonic, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from fovea.bench.chaos.faults import NOTICE_SECONDS, RECOVERY_SECONDS, FaultLog
from tests.service.model_machine.builds import TOLERANCE, Build, ModelFiles

ANSWER_LIMIT: Final = 15.0
"""Time limit for an answer of a loaded model without faults, in seconds; the processors may be busy."""

ON_DEMAND_SECONDS: Final = 30.0
"""Additional time limit if models are loaded on demand, in seconds: other models may be loaded before."""

RESTART_SECONDS: Final = 10.0
"""Additional time limit for each runner that is killed or stopped meanwhile, in seconds."""

CHANGE_LIMIT: Final = 60.0
"""Time limit for a load or an unload, in seconds; other changes may come before."""

SLACK_SECONDS: Final = 5.0
"""Allowed delay of an answer after its deadline, in seconds; client and service share two busy processors."""


class Mode(NamedTuple):
    """The last wish of a caller for a model: by default the repository chooses the version."""

    is_unloaded: bool = False
    version: str | None = None
    """Version that was requested by its number."""


FOLLOW: Final = Mode()


@dataclass(eq=False)
class Operation:
    """A request that runs in a thread: a question to a model, or a change."""

    action: str
    """`classify`, `explain`, `load` or `unload`."""
    name: str
    version: str | None = None
    is_default: bool = False
    """True if the request names no model."""
    deadline: float | None = None
    """Deadline in seconds."""
    began_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    """Status of the answer; 0 without an answer."""
    content: Any = None
    """JSON of the answer, or the reason for a missing answer."""

    @property
    def seconds(self) -> float:
        """Return the duration in seconds."""
        return self.ended_at - self.began_at

    @property
    def is_change(self) -> bool:
        """Return whether the request changes which models are served."""
        return self.action in ("load", "unload")

    @property
    def error_code(self) -> str:
        """Return the error code of the answer; empty for an answer without an error."""
        inner = self.content.get("error") if isinstance(self.content, dict) else None
        if isinstance(inner, dict):
            return str(inner.get("code"))
        return str(self.content.get("code", "")) if isinstance(self.content, dict) else ""

    def __str__(self) -> str:
        deadline = f" within {1000 * self.deadline:g} ms" if self.deadline else ""
        name = "the default model" if self.is_default else self.name
        return f"{self.action} {name}{f' version {self.version}' if self.version else ''}{deadline}"


@dataclass
class _Period:
    """A period in which a file may answer; without a file, the model may be missing."""

    build: Build | None
    began_at: float
    ended_at: float = float("inf")


@dataclass
class ModelHistory:
    """What one model may answer with at any time.

    Each change allows more outcomes. When the service has settled, only one remains.
    """

    modes: set[Mode] = field(default_factory=lambda: {FOLLOW})
    """Possible last wishes of callers."""
    changes: list[Operation] = field(default_factory=list)
    """Loads and unloads since the service had settled."""
    _periods: list[_Period] = field(default_factory=list)

    def allow(self, build: Build | None) -> None:
        """Allow an outcome from now on, beside the others."""
        if build not in self.list_possible():
            self._periods.append(_Period(build, time.monotonic()))

    def keep_only(self, build: Build | None) -> None:
        """Allow only this outcome from now on.

        It is allowed even if it was not before: on demand, a served file that is gone leaves no model.
        """
        self.allow(build)
        now = time.monotonic()
        for period in self._periods:
            if period.build is not build:
                period.ended_at = min(period.ended_at, now)

    def list_possible(self, start: float | None = None, end: float | None = None) -> list[Build | None]:
        """Return all possible outcomes in a period; now by default."""
        now = time.monotonic()
        start, end = now if start is None else start, now if end is None else end
        return [one.build for one in self._periods if one.began_at <= end and start < one.ended_at]

    def conclude_changes(self, builds: Sequence[Build]) -> None:
        """Find the possible last wishes after all changes have been answered; `builds` are the model's files.

        A change may have been the last one unless another one began after its end. A version that was
        requested is wanted only until it is removed.
        """
        successes = [one for one in self.changes if one.status == 200]
        last = [one for one in successes if all(other.began_at < one.ended_at for other in successes)]
        if last:
            self.modes = {Mode(one.action == "unload", one.version) for one in last}
            removed = {one.version: one.removed_at for one in builds if one.removed_at < float("inf")}
            if any(one.version and removed.get(one.version, 0.0) >= one.began_at for one in last):
                self.modes.add(FOLLOW)
        self.changes = []


class Judge:
    """The judge of finished requests."""

    def __init__(
        self,
        files: ModelFiles,
        histories: dict[str, ModelHistory],
        faults: FaultLog,
        *,
        loads_on_demand: bool,
    ) -> None:
        self._files = files
        self._histories = histories
        self._faults = faults
        self._loads_on_demand = loads_on_demand

    def find_complaint(self, operation: Operation) -> str:
        """Return what is wrong with a finished request; empty if nothing is wrong."""
        if not operation.status:
            return f"lost: {operation.content}"
        limit = self._compute_limit(operation)
        if operation.seconds > limit:
            return f"late: {operation.status} after {operation.seconds:.1f} s; at most {limit:.1f} s"
        if operation.status == 200:
            return self._find_mistake(operation)
        reason = self._find_change_excuse(operation) if operation.is_change else self._find_excuse(operation)
        return "" if reason else f"{operation.status} {operation.error_code}: {operation.content}"

    def _compute_limit(self, operation: Operation) -> float:
        """Return the time limit of a request in seconds."""
        if operation.is_change:
            limit = CHANGE_LIMIT
        else:
            limit = ANSWER_LIMIT + (ON_DEMAND_SECONDS if self._loads_on_demand else 0.0)
        limit += RESTART_SECONDS * self._count_faults(operation, "runner", NOTICE_SECONDS)
        return min(limit, operation.deadline + SLACK_SECONDS) if operation.deadline else limit

    def _count_faults(self, operation: Operation, target: str, seconds: float) -> int:
        """Return the number of faults during a request, and up to `seconds` before it."""
        return len(self._faults.find_overlapping(operation.began_at - seconds, operation.ended_at, target))

    def _may_lack_runners(self, operation: Operation) -> bool:
        """Return whether both runners may have died lately. One death is no reason to refuse anything."""
        return self._count_faults(operation, "runner", RECOVERY_SECONDS) > 1

    def _find_mistake(self, operation: Operation) -> str:
        """Return what is wrong with an answer 200."""
        possible = self._list_possible(operation)
        if operation.is_change:
            versions = {one["version"] for one in operation.content}
            expected_versions = {one.version for one in possible if one}
            return "" if versions <= expected_versions else f"it lists {versions}, not {expected_versions}"
        for result in operation.content.get("results", [operation.content]):
            if error := result.get("error"):
                if error["code"] == "internal" and self._has_killed_two(operation):
                    continue
                return f"an image got {error}"
            probabilities = {one["label"]: one["probability"] for one in result["predictions"]}
            build = self._files.find_build(operation.name, probabilities)
            if build is None:
                return f"the labels of no version of this model: {operation.content}"
            if build not in possible:
                return f"the answer of {build}; only {', '.join(map(str, possible))} may answer"
            if operation.content["model"] != {"name": build.name, "version": build.version}:
                return f"the answer of {build} under the name {operation.content['model']}"
            if operation.version not in (None, build.version):
                return f"the answer of version {build.version}, not of {operation.version}"
            if any(abs(build.probabilities[label] - one) > TOLERANCE for label, one in probabilities.items()):
                return f"wrong probabilities: {probabilities}, not {build.probabilities}"
        return ""

    def _list_possible(self, operation: Operation) -> list[Build | None]:
        return self._histories[operation.name].list_possible(operation.began_at, operation.ended_at)

    def _find_excuse(self, operation: Operation) -> bool:
        """Return whether a question may get this error."""
        possible = self._list_possible(operation)
        match operation.status, operation.error_code:
            case 404, "model_not_found":
                other = [one for one in possible if one is None or one.version != operation.version]
                return bool(other) if operation.version else None in possible
            case 503, "not_ready":
                # On demand, the service may find out only now that the file is gone.
                is_unloadable = self._loads_on_demand and any(
                    one and one.removed_at <= operation.ended_at for one in possible
                )
                target = "explainer" if operation.action == "explain" else ""
                is_killed = self._count_faults(operation, target, NOTICE_SECONDS) > 0
                may_lack_models = None in possible or is_unloadable
                return may_lack_models or is_killed or self._may_lack_runners(operation)
            case 504, "deadline_exceeded":
                return operation.deadline is not None and operation.seconds > operation.deadline - 0.01
            case 500, "internal":
                return operation.action == "classify" and self._has_killed_two(operation)
        return False

    def _has_killed_two(self, operation: Operation) -> bool:
        """Return whether two runners may have died with an image of the request, which is given up then."""
        return self._count_faults(operation, "runner", NOTICE_SECONDS) > 1

    def _find_change_excuse(self, operation: Operation) -> bool:
        """Return whether a load or an unload may get this error."""
        period = operation.began_at, operation.ended_at
        match operation.status, operation.error_code:
            case 404, "model_not_found":
                if operation.action == "unload":
                    return None in self._list_possible(operation)
                return not any(
                    one.is_present(*period)
                    for one in self._files.builds
                    if one.name == operation.name and operation.version in (None, one.version)
                )
            case 409, "swap_refused":
                builds = [one for one in self._files.builds if one.name == operation.name]
                is_bad = any(not one.is_good and one.may_be_present(*period) for one in builds)
                is_changed = any(
                    one.may_be_present(*period) and not one.is_present(*period) for one in builds
                )
                has_reason = is_bad or is_changed or self._may_lack_runners(operation)
                return operation.action == "load" and has_reason
        return False
