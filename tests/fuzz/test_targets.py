"""The fuzz targets accept their seeds, pass the kept inputs, and notice a parser that breaks."""

from __future__ import annotations

import random
import re

import pytest

from tests.fuzz.run import ROOT
from tests.fuzz.target import CORPUS, TARGETS, Target, list_kept_inputs, load_target


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    """A target that refuses everything at its first line would find nothing for ever."""
    target = load_target(name)
    for seed in target.make_seeds():
        assert len(seed) <= target.max_size
        assert target.check(seed), seed[:200]


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_are_read_or_refused(name: str) -> None:
    target = load_target(name)
    for path in list_kept_inputs(name):
        target.check(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_changed_seeds_are_read_or_refused(name: str) -> None:
    """A fuzzer's first seconds, without its guidance."""
    target, choice = load_target(name), random.Random(0)  # noqa: S311
    seeds = target.make_seeds()
    outcomes = [target.check(_change(target, choice.choice(seeds), choice)) for _ in range(60)]
    assert True in outcomes
    assert False in outcomes


def _change(target: Target, data: bytes, choice: random.Random) -> bytes:
    for _ in range(choice.randint(0, 3)):
        if target.mutate and choice.random() < 0.7:
            data = target.mutate(data, choice)
        elif data:
            place = choice.randrange(len(data))
            data = data[:place] + choice.choice((b"", b"\0", b"\r\n", b"9")) + data[place + 1 :]
    return data[: target.max_size]


def test_kept_inputs_are_small() -> None:
    assert {path.parent.name for path in CORPUS.glob("*/*")} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 200_000


def test_page_lists_every_target() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) >= set(TARGETS)


def test_every_attack_has_an_existing_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \| `(tests/\S+\.py)::(test_\w+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 40
    for _, _, path, name in rows:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), name
