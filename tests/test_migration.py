"""Every command and program of `docs/migrate.md` is run and writes the output that the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.servers import ROOT, Server
from tests.tools import require_tool

GUIDE = (ROOT / "docs" / "migrate.md").read_text()

ADDRESS = "localhost:8000"


class Example(NamedTuple):
    """A command line, and the output that the guide shows for it."""

    line: list[str]
    output: str


def read_examples() -> Iterator[Example]:
    """Yield the commands after `$ ` with the lines below them, then the programs with the block below them.

    A command may continue on the next line after a `|`.
    """
    for block in re.findall(r"^```console\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL):
        for command, output in re.findall(r"^\$ ((?:.*\|\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            yield Example(["bash", "-c", command], output)
    programs = r"^```python\n(.*?)^```\n\n```text\n(.*?)^```"
    for program, output in re.findall(programs, GUIDE, re.MULTILINE | re.DOTALL):
        yield Example([sys.executable, "-c", program], output)


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_every_example_of_the_guide_is_read() -> None:
    programs = [example for example in read_examples() if example.line[0] != "bash"]
    assert (len(list(read_examples())), len(programs)) == (GUIDE.count("\n$ ") + GUIDE.count("```text"), 2)


@pytest.mark.parametrize("example", list(read_examples()))
def test_guide_example_writes_the_documented_output(zoo_server: Server, example: Example) -> None:
    if "curl" in example.line[-1]:
        require_tool("curl")
    expected_words, expected_numbers = split_numbers(example.output)
    actual_words, actual_numbers = split_numbers(run_example(zoo_server, example))
    assert actual_words == expected_words
    assert actual_numbers == pytest.approx(expected_numbers, abs=1e-3)


def test_guide_names_only_existing_settings() -> None:
    assert set(re.findall(rf"{ENVIRONMENT_PREFIX}[A-Z_]+", GUIDE)) <= {
        ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields
    }


def run_example(server: Server, example: Example) -> str:
    address = server.url.removeprefix("http://")
    line = [part.replace(ADDRESS, address) for part in example.line]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def split_numbers(text: str) -> tuple[str, list[float]]:
    """Return the text without its numbers, request ids and white space; and the numbers."""
    text = re.sub(r'"request_id":"\w+"', '"request_id":"…"', re.sub(r"\s", "", text))
    number = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.sub(number, "#", text), [float(match) for match in re.findall(number, text)]
