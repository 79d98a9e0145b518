"""Explanations belong to their questions when other clients leave: the short form of `make explanations`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fovea.bench import explanations

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_explanation_belongs_to_its_question(workers: str, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        explanations.start_service(log, FOVEA_WORKERS=workers) as (url, process),
    ):
        results = explanations.ask_service(url, process.pid, cams=110, occlusions=4, seed=1)
    assert results.failures == []
    assert results.restarts == 2
    assert min(results.leavers.values()) > 0
    assert results.leavers.keys() == {"sending", "waiting", "reading"}
