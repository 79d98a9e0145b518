"""Targets of the Makefile, and the programs that CI installs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT
from tests.tools import DEBIAN_PACKAGES


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("ensurepip", "Fovea needs Python's venv module: apt-get install python3-venv"),
        (
            "version_info",
            "Fovea needs Python 3.11 or newer: install it, or name it as PYTHON=/path/to/python3",
        ),
    ],
)
def test_make_serve_names_missing_requirement(tmp_path: Path, missing: str, message: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{missing}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    process = subprocess.run(
        ["make", "--no-print-directory", "serve", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode != 0
    assert process.stdout == f"{message}\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("target", "program"), [("serve", "fovea"), ("setup", None)])
def test_make_announces_installation_and_shows_progress(
    tmp_path: Path, target: str, program: str | None
) -> None:
    """A fake pip prints a line and writes a `fovea` that prints a line."""
    bin_folder = tmp_path / "venv" / "bin"
    python = tmp_path / "python3"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"-m venv"*) mkdir -p $3/bin; cp $0.pip $3/bin/pip; touch $3/bin/python; exit;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    pip = tmp_path / "python3.pip"
    pip.write_text(
        '#!/bin/sh\ncase "$*" in *quiet*) ;; *) echo Collecting numpy;; esac\n'
        'printf "#!/bin/sh\\necho fovea serves\\n" > ${0%pip}fovea; chmod +x ${0%pip}fovea\n'
    )
    python.chmod(0o755)
    pip.chmod(0o755)
    command = ["make", "--no-print-directory", target, f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    first, second, third, *remaining_lines = process.stdout.splitlines()
    assert first == f"Making {tmp_path / 'venv'}, a place of its own for what Fovea needs"
    assert second.startswith("Installing ")
    assert "once, for" in second
    assert third == "Collecting numpy"
    assert remaining_lines == (["fovea serves"] if program else [])
    second_output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Installing" not in second_output
    assert (bin_folder / "fovea").exists()


def test_make_help_names_serve_and_test() -> None:
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"serve", "test"} <= {line.split()[0] for line in output.splitlines()}


def test_ci_installs_every_program_that_tests_need() -> None:
    """In CI a test that is skipped because of a missing program fails (tests/conftest.py)."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "export CI=true" in script
    for tool, package in DEBIAN_PACKAGES.items():
        assert f"need {tool} {package}\n" in script


@pytest.mark.long
@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_missing_program_skips_test_and_fails_it_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    (tmp_path / "python").symlink_to(sys.executable)  # the only program
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider",
         "tests/deploy/test_alerts.py::test_promtool_accepts_the_configuration"],
        cwd=ROOT, env={**os.environ, "PATH": str(tmp_path), "CI": ci},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome in process.stdout
    assert "promtool is missing: on Debian, apt-get install prometheus" in process.stdout
