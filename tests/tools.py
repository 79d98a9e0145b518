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
"""Debian's package of each; `.ci/run` installs them all."""

SYSTEM_REASON = "this system "
"""How the reason of a skip begins that no package can mend. All others fail where `CI` is set."""


def find_tool(tool: str) -> str | None:
    """Return the path of a program, also of an administrator's; None where it is missing."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def require_tool(tool: str) -> str:
    """Return the path of a program; skip the test where it is missing."""
    path = find_tool(tool)
    if path is None:
        pytest.skip(f"{tool} is missing: on Debian, apt-get install {DEBIAN_PACKAGES[tool]}")
    return path


def require_namespaces() -> list[str]:
    """Return the command that runs another as process 1; skip the test where the system does not allow it."""
    command = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{SYSTEM_REASON}lets no namespace of processes be made")
    return command
