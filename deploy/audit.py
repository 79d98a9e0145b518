"""Ask OSV whether a locked package has a known vulnerability: `make audit`.

Exit status 0 means that every package was looked up and none has a vulnerability. Without an answer from OSV
nothing was looked up: this prints NOT AUDITED, and with `--strict` it is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Final

_DEPLOY: Final = Path(__file__).resolve().parent

LOCK_FILES: Final = ("image/cpu.txt", "image/cuda.txt", "release-tools.txt", "audit-tools.txt")
"""Files in this folder that list packages with their hashes."""

_OSV_URL: Final = os.environ.get("OSV_URL", "https://api.osv.dev/v1/query")

_TIMEOUT: Final = 15
"""Time limit of one question to OSV in seconds."""


def find_obstacle() -> str:
    """Return the reason why OSV does not answer, or an empty string if it does."""
    question = json.dumps({"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "1.0"}).encode()
    request = urllib.request.Request(_OSV_URL, question, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:  # noqa: S310 - our own address
            # This old version has known vulnerabilities, so an empty answer is not OSV's.
            return "" if json.load(reply).get("vulns") else f"{_OSV_URL} knows no vulnerability of pip 1.0"
    except (OSError, ValueError, AttributeError) as error:
        return f"{_OSV_URL} does not answer: {error}"


def main() -> int:
    """Audit all lock files and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strict", action="store_true", help="fail if OSV does not answer")
    parser.add_argument(
        "--only-ask", action="store_true", help="see whether OSV answers; fail if it does not"
    )
    parser.add_argument("files", nargs="*", type=Path, default=[_DEPLOY / name for name in LOCK_FILES])
    arguments = parser.parse_args()
    if obstacle := find_obstacle():
        print(f"NOT AUDITED: {obstacle}", flush=True)
        return int(arguments.strict or arguments.only_ask)
    if arguments.only_ask:
        return 0
    program = Path(sys.executable).parent / "pip-audit"
    options = ["--strict", "--require-hashes", "--disable-pip", "--progress-spinner=off"]
    service = ["--vulnerability-service=osv", f"--osv-url={_OSV_URL}", f"--timeout={_TIMEOUT}"]
    is_clean = True
    for path in arguments.files:
        print(f"{path}:", flush=True)
        command = [program, *options, *service, f"--requirement={path}"]
        is_clean &= subprocess.run(command, check=False).returncode == 0  # noqa: S603
    return int(not is_clean)


if __name__ == "__main__":
    sys.exit(main())
