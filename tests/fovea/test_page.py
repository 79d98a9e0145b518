"""The examples of `docs/python.md` run, and print what their comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import read_page
from tests.servers import ROOT, Server

EXAMPLES = re.findall(r"^```python\n(.*?)^```", read_page("python"), re.MULTILINE | re.DOTALL)

OUTPUTS = {4: "ship\nunreadable_file\nunsupported_format\n"}
"""Outputs that the text of the page states, by the number of the example; others stand behind `print`."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(ROOT / "zoo")) as instance:
        yield instance


@pytest.mark.parametrize("number", range(1, len(EXAMPLES) + 1))
def test_example_prints_what_it_says(number: int, server: Server, tmp_path: Path) -> None:
    example = EXAMPLES[number - 1]
    expected = re.findall(r"^.*print\(.*\)  # (.*)$", example, re.MULTILINE)
    script = tmp_path / "example.py"
    script.write_text(example.replace("http://127.0.0.1:8000", server.url))
    process = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.stderr, process.returncode) == ("", 0)
    assert process.stdout == OUTPUTS.get(number, "".join(f"{line}\n" for line in expected))
    assert process.stdout


def test_page_has_examples_of_both_ways() -> None:
    assert len(EXAMPLES) == 7
    assert sum("fovea.load" in example for example in EXAMPLES) == 5
