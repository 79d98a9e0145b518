"""Imports of sources for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.pipeline import ImportReport, import_model
from fovea.export.importer.preprocessing import PreprocessingOptions
from fovea.export.importer.sources.completion import GivenOptions, complete_request
from fovea.export.importer.sources.resolve import resolve_source
from fovea.service.inference.engine import Engine


def import_source(
    tmp_path: Path, source: Path | str, choice: str | None = None, **options: Any
) -> tuple[ImportReport, Engine]:
    """Import a source into `tmp_path/zoo`."""
    given = GivenOptions(**{"out": tmp_path / "zoo", "preprocessing": PreprocessingOptions(), **options})
    with resolve_source(str(source), choice, given.size) as resolved_source:
        report = import_model(complete_request(given, resolved_source))
    file = tmp_path / "zoo" / report.model / report.version / "model.onnx"
    return report, Engine.load(file, provider="cpu", threads=1)


def read_refusal(tmp_path: Path, source: Path | str, choice: str | None = None, **options: Any) -> str:
    """Return the message of an import that is refused and leaves nothing behind."""
    with pytest.raises(ImportRefused) as caught:
        import_source(tmp_path, source, choice, **options)
    assert not (tmp_path / "zoo").exists()
    return str(caught.value)
