"""Workloads of the benchmark with and without test data."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fovea.bench import workloads
from fovea.bench.workloads import WORKLOADS
from tests.pictures import make_jpeg


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of an empty cache, without test data."""
    monkeypatch.setattr(workloads, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(workloads, "_DRAWN_FOLDER", tmp_path / "cache" / "drawn")
    monkeypatch.setenv("TEST_DATA", str(tmp_path / "data"))
    workloads._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "count", "size"), [("thumbnails", 500, (32, 32)), ("photographs", 40, (500, 375))]
)
def test_pictures_are_drawn_without_test_data(
    cache: Path, capsys: pytest.CaptureFixture[str], name: str, count: int, size: tuple[int, int]
) -> None:
    workload = WORKLOADS[name]
    images = workload.images
    assert workload.is_drawn
    assert len({path.read_bytes() for path in images}) == len(images) == count
    for path in images[:5]:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", size)
    times = [path.stat().st_mtime_ns for path in images]
    assert [path.stat().st_mtime_ns for path in workload.images] == times  # they are drawn once
    message = capsys.readouterr().err
    assert message.count("drawn pictures take its place") == 1
    assert "set TEST_DATA to the folder of the test data" in message


def test_existing_test_data_take_precedence(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WORKLOADS["photographs"].is_drawn
    (tmp_path / "data").mkdir()
    content = make_jpeg(80, 60)
    with tarfile.open(tmp_path / "data" / "photos.tar", "w") as archive:
        entry = tarfile.TarInfo("photos/one.JPEG")
        entry.size = len(content)
        archive.addfile(entry, BytesIO(content))
    capsys.readouterr()
    assert [path.read_bytes() for path in WORKLOADS["photographs"].images] == [content]
    assert not WORKLOADS["photographs"].is_drawn
    assert capsys.readouterr().err == ""
