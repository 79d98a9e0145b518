"""Measurements of processes from /proc."""

from __future__ import annotations

import os
import sys

from fovea.bench.processes import (
    CpuStopwatch,
    find_process_tree,
    measure_cpu_seconds,
    measure_resident_bytes,
    start_process,
    wait_until_idle,
)

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
child.wait()
"""
CHILD = """
import time
held = b"x" * 50_000_000
while time.process_time() < 0.5: pass
print("done", flush=True)
time.sleep(60)
"""


def test_process_tree_is_measured_and_ended() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as output:
        with start_process([sys.executable, "-c", PARENT, CHILD], stdout=write_end) as process:
            os.close(write_end)
            watch = CpuStopwatch([process.pid])
            assert output.readline() == "done\n"
            assert len(find_process_tree(process.pid)) == 2
            assert measure_cpu_seconds([process.pid]) >= 0.4
            assert watch.read()[0] >= 0.3
            assert measure_resident_bytes([process.pid]) > 50_000_000
            wait_until_idle([process.pid], limit=5)
        assert process.returncode is not None
        assert output.read() == ""  # no process is left that could write
