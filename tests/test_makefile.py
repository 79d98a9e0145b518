"""`make serve` on a machine that lacks something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("ensurepip", "Fovea needs Python's venv module: apt-get install python3-venv"),
        (
            "version_info",
            "Fovea needs Python 3.11 or newer: install it, or name it as PYTHON=/path/to/python3",
        ),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path: Path, missing: str, sentence: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{missing}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ended = subprocess.run(
        ["make", "--no-print-directory", "serve", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert ended.stdout == f"{sentence}\n"
    assert not (tmp_path / "venv").exists()


def test_help_names_the_two_commands() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"serve", "test"} <= {line.split()[0] for line in shown.splitlines()}
