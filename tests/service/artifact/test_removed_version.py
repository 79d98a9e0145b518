"""Versions are removed whole, also by several calls at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fovea.service.artifact.removed_version import remove_version


def test_calls_at_the_same_time_remove_all_versions(tmp_path: Path) -> None:
    """Each call also deletes the hidden folders of the others, as if these calls had been interrupted."""
    folders = [tmp_path / "pets" / str(number) for number in range(200)]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{number}.txt").write_text("content")
    with ThreadPoolExecutor(8) as executor:
        assert set(executor.map(remove_version, folders)) == {None}
    assert list(tmp_path.iterdir()) == []
