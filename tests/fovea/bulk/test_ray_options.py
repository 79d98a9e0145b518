"""The options of `fovea classify` for a Ray cluster, which are checked before Ray is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Command, read_error_line
from tests.pictures import make_jpeg


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray"], "--engine ray needs --out"),
        (["--address", "auto", "--out", "x.csv"], "--address needs --engine ray"),
    ],
    ids=["no table", "no engine"],
)
def test_options_that_need_others(
    command: Command, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cat.jpg").write_bytes(make_jpeg())
    assert command("classify", tmp_path / "cat.jpg", *words) == 2
    assert message in read_error_line(capsys)
