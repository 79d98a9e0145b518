"""The examples of the pages run, and those of `docs/python.md` print what their comments say."""

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

pytestmark = pytest.mark.long


def find_examples(page: str) -> list[str]:
    """Return the examples in Python."""
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


EXAMPLES = find_examples(read_page("python"))

OUTPUTS = {5: "ship\nunreadable_file\nunsupported_format\n"}
"""Outputs that the text of the page states, by the number of the example; others stand behind `print`."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(ROOT / "zoo")) as instance:
        yield instance


def run_example(example: str, server: Server, folder: Path) -> str:
    """Return what an example prints, with the address of the server in place of its own."""
    script = folder / "example.py"
    script.write_text(example.replace("http://127.0.0.1:8000", server.url))
    process = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (process.stderr, process.returncode) == ("", 0)
    return process.stdout


@pytest.mark.parametrize("number", range(1, len(EXAMPLES) + 1))
def test_example_prints_what_it_says(number: int, server: Server, tmp_path: Path) -> None:
    example = EXAMPLES[number - 1]
    expected = re.findall(r"^.*print\(.*\)  # (.*)$", example, re.MULTILINE)
    output = run_example(example, server, tmp_path)
    assert output == OUTPUTS.get(number, "".join(f"{line}\n" for line in expected))
    assert output


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_examples_of_other_pages_run(page: str, server: Server, tmp_path: Path) -> None:
    examples = find_examples((ROOT / page).read_text())
    assert examples
    for example in examples:
        assert "ship" in run_example(example, server, tmp_path)


def test_page_has_examples_of_both_ways() -> None:
    assert len(EXAMPLES) == 8
    assert sum("fovea.load" in example for example in EXAMPLES) == 6
