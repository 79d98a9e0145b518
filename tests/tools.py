"""Programs that tests need and that pip does not install. A test whose program is missing is skipped."""

from __future__ import annotations

import importlib.util
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


HAS_OPENVINO = importlib.util.find_spec("onnxruntime_ep_openvino") is not None

needs_openvino = pytest.mark.skipif(
    not HAS_OPENVINO, reason=f"{SYSTEM_REASON}has no OpenVINO: pip install onnxruntime-ep-openvino"
)
"""Mark of tests that need OpenVINO's plugin, which is too large (53 MB) to be installed everywhere."""

without_openvino = pytest.mark.skipif(HAS_OPENVINO, reason=f"{SYSTEM_REASON}has OpenVINO")
"""Mark of tests of the refusal without the plugin."""


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason=f"{SYSTEM_REASON}has no transformers: pip install 'fovea-serve[hub]'",
)
"""Mark of tests that convert models of transformers or run its image processors."""


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
