"""Programs that tests need and that pip does not install. A test whose program is missing is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

DEBIAN_PACKAGES = {
    "chromium": "chromium",
    "curl": "curl",
    "faketime": "faketime",
    "haproxy": "haproxy",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}
"""Debian package of each program; `.ci/run` installs all."""

SYSTEM_REASON = "this system "
"""Start of a skip reason that no package can remove. Where `CI` is set, other skips are failures."""


def find_tool(tool: str) -> str | None:
    """Return the path of a program, also from the sbin folders; None if it is missing."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def require_tool(tool: str) -> str:
    """Return the path of a program; skip the test if it is missing."""
    path = find_tool(tool)
    if path is None:
        pytest.skip(f"{tool} is missing: on Debian, apt-get install {DEBIAN_PACKAGES[tool]}")
    return path


def require_namespaces() -> list[str]:
    """Return a command that runs another as process 1; skip the test if the system forbids that."""
    command = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{SYSTEM_REASON}lets no namespace of processes be made")
    return command
