"""The pages of the documentation that describe Fovea as it is: README.md and docs/, without the decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.servers import ROOT

DOCS: Final = ROOT / "docs"


def list_pages() -> list[Path]:
    """README.md and the pages of docs/. Decisions are left out: they also name what has gone since."""
    return [ROOT / "README.md", *(path for path in sorted(DOCS.glob("*.md")) if path.stem != "decisions")]


def read_page(name: str) -> str:
    """The text of `docs/<name>.md`."""
    return (DOCS / f"{name}.md").read_text()
