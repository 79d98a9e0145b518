"""What is read of /proc is what was used."""

from __future__ import annotations

import os
import sys

from fovea.bench.processes import Stopwatch, cpu_seconds, resident_bytes, running, settle, tree

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


def test_a_tree_is_measured_with_its_children_and_ended_with_them() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as output:
        with running([sys.executable, "-c", PARENT, CHILD], stdout=writing) as process:
            os.close(writing)
            watch = Stopwatch([process.pid])
            assert output.readline() == "done\n"
            assert len(tree(process.pid)) == 2
            assert cpu_seconds([process.pid]) >= 0.4
            assert watch.read()[0] >= 0.3
            assert resident_bytes([process.pid]) > 50_000_000
            settle([process.pid], limit=5)
        assert process.returncode is not None
        assert output.read() == ""  # nobody is left who could write
