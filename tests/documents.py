"""The pages that describe the current state of Fovea: README.md and docs/, without the decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.servers import ROOT

DOCS: Final = ROOT / "docs"


def list_pages() -> list[Path]:
    """Return README.md and the pages of docs/ without the decisions, which also name removed things."""
    return [ROOT / "README.md", *(path for path in sorted(DOCS.glob("*.md")) if path.stem != "decisions")]


def read_page(name: str) -> str:
    """Return the text of `docs/<name>.md`."""
    return (DOCS / f"{name}.md").read_text()
