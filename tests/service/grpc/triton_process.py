"""Triton's clients in a process of their own (`triton_calls`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers import ROOT


def run_triton(*steps: str, address: str = "", images: Sequence[Path] = ()) -> Any:
    """Take steps of `triton_calls.main`, and return the results by step."""
    order = {"steps": steps, "address": address, "images": list(map(str, images))}
    process = subprocess.run(
        [sys.executable, "-m", "tests.service.grpc.triton_calls"],
        input=json.dumps(order),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
