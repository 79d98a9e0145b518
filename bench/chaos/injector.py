"""Faults on purpose: killed and stopped processes, swapped versions and unloaded models."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final

from fovea.bench.caller import BrokenConnection, Connection, Response, build_request
from fovea.bench.chaos.faults import NOTICE_SECONDS, RECOVERY_SECONDS, Fault
from fovea.bench.chaos.service import BATCH_TIMEOUT, TRIAL_SECONDS, has_ended, open_process, send_signal
from fovea.bench.chaos.state import OVERLAP_SECONDS, ChaosState, close_connections
from fovea.bench.chaos.verdict import ClientRequest
from fovea.bench.swaps import BenchRepository

CHANGE_LIMIT: Final = 2 * 10 * TRIAL_SECONDS + 10.0
"""Time limit for one load or unload, in seconds: a trial, and then all runners."""

_MAX_TRIES: Final = 40
"""Number of tries for a change; a load takes some seconds, and a process is often killed meanwhile."""

_MAX_OUTAGE: Final = 60.0
"""Time for which no worker may answer after all were killed or stopped, in seconds.

A worker starts in three seconds on an idle machine, and its start may be interrupted by another kill.
"""


class FaultInjector:
    """The actors that disturb one service and change its models."""

    def __init__(self, state: ChaosState, repository: BenchRepository, *, has_memory_limit: bool) -> None:
        self._state = state
        self._repository = repository
        self._has_memory_limit = has_memory_limit

    async def inject_faults(self, target: str, gap: float, *, is_kill: bool) -> None:
        """Kill or stop one of the service's processes repeatedly, about every `gap` seconds."""
        generator = self._state.make_generator(f"{target} {is_kill}")
        while await self._state.pause(generator.uniform(0.5, 1.5) * gap):
            pids = self._state.service.find_pids(target)
            if not pids:
                continue
            with open_process(self._state.service, generator.choice(pids)) as descriptor:
                if descriptor is None:
                    continue
                if is_kill:
                    now = time.monotonic()
                    self._state.faults.add(Fault(target, "killed", now, now + NOTICE_SECONDS))
                    send_signal(descriptor, signal.SIGKILL)
                else:
                    await self._stop_process(descriptor, target, generator.uniform(0.3, 1.6 * BATCH_TIMEOUT))

    async def probe_workers(self) -> None:
        """Ask repeatedly whether any worker answers.

        After a kill, no worker may answer until another has started. Callers must wait for that long, but not
        longer than `_MAX_OUTAGE`.
        """
        outage: Fault | None = None
        while await self._state.pause(0.5):
            began_at = time.monotonic()
            if await self._is_live():
                if outage:
                    outage.ended_at = time.monotonic() + NOTICE_SECONDS
                outage = None
            elif outage is None:
                if not self._state.faults.find_overlapping(began_at - RECOVERY_SECONDS, began_at, "worker"):
                    self._state.failures.append(
                        "no worker answers /health/live, although none was killed or stopped"
                    )
                outage = self._state.faults.add(Fault("worker", "outage", began_at - 0.5))
            elif began_at - outage.began_at > _MAX_OUTAGE:
                self._state.failures.append(f"no worker has answered /health/live for {_MAX_OUTAGE:g} s")
                return
        if outage:
            outage.ended_at = time.monotonic() + RECOVERY_SECONDS

    async def _is_live(self) -> bool:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(1.0):
                connection = await Connection.open(self._state.address)
                await connection.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                return (await connection.receive()).status == 200
        except (BrokenConnection, TimeoutError):
            self._state.stray_count += 1
            return False
        finally:
            if connection:
                connection.abort()

    async def _stop_process(self, descriptor: int, target: str, seconds: float) -> None:
        """Stop a process, and continue it after `seconds` unless it was killed meanwhile."""
        fault = self._state.faults.add(Fault(target, "stopped", time.monotonic()))
        try:
            send_signal(descriptor, signal.SIGSTOP)
            end = time.monotonic() + seconds
            while (
                time.monotonic() < end and not has_ended(descriptor) and not self._state.stop_event.is_set()
            ):
                await asyncio.sleep(0.05)
        finally:
            send_signal(descriptor, signal.SIGCONT)
            fault.ended_at = time.monotonic() + NOTICE_SECONDS

    async def swap_versions(self, gap: float) -> None:
        """Publish and load a new version repeatedly, about every `gap` seconds."""
        generator = self._state.make_generator("swap")
        while await self._state.pause(generator.uniform(0.5, 1.5) * gap):
            version = self._repository.publish_next_version()
            # before the load: the new version may answer before the load itself is answered
            self._state.versions.add_version(version)
            if await self._change_model("swapped", "load"):
                self._state.swaps += 1
                self._state.versions.keep_only(version)

    async def unload_and_load(self, gap: float) -> None:
        """Unload the second model and load it again repeatedly, about every `gap` seconds."""
        generator = self._state.make_generator("unload")
        while await self._state.pause(generator.uniform(0.5, 1.5) * gap):
            fault = self._state.faults.add(Fault("second", "unloaded", time.monotonic()))
            await self._change_model("second", "unload")
            await self._state.pause(generator.uniform(0.1, 2.0))
            if await self._change_model("second", "load"):
                fault.ended_at = time.monotonic() + OVERLAP_SECONDS[2 if self._state.has_workers else 1]

    async def _change_model(self, model: str, action: str) -> bool:
        """Load or unload a model; try again if processes die meanwhile."""
        tries = 0
        while tries < _MAX_TRIES:
            began_at = time.monotonic()
            status, text = await self._request_change(model, action)
            now = time.monotonic()
            if status == 200 or (status == 404 and action == "unload"):
                return True
            if not self._state.service.is_alive:
                return False
            if status == 409 and self._has_memory_limit and "memory" in text:
                self._state.memory_refusals += 1  # a trial without room is postponed, and the answer says so
                if not await self._state.pause(2.0):
                    return False
                continue
            if not self._state.faults.find_overlapping(began_at - NOTICE_SECONDS, now, "runner", "worker"):
                self._state.failures.append(
                    f"{action} {model}: {status} {text}, although no process was killed meanwhile"
                )
                return False
            tries += 1
            await asyncio.sleep(0.5)
        self._state.failures.append(f"{action} {model}: failed {_MAX_TRIES} times, the last time with {text}")
        return False

    async def _request_change(self, model: str, action: str) -> tuple[int, str]:
        route = f"/v2/repository/models/{{name}}/{action}"
        request = ClientRequest(
            action, route, 0.0, 0.0, CHANGE_LIMIT, frozenset({200, 404, 409, 500, 503}), images=0
        )
        content = build_request(route.format(name=model), b"{}", {"Content-Type": "application/json"})
        connections: list[Connection] = []

        def check_response(response: Response, _: ClientRequest) -> str:
            return "" if response.content.startswith(b"[") else f"{response.content[:100]!r}"

        request = await self._state.send_request(request, content, check_response, connections)
        close_connections(connections)
        return request.status, request.failure_reason or request.text
