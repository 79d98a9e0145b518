"""Configuration of the documentation site: `make docs` builds it into build/docs.

Why Sphinx: the site must build strictly, must read without a network, and must last. MkDocs Material gets
critical fixes only until 2027-05, and its successor is young. Sphinx is maintained, reports every broken
link as an error (`-n -W`), and MyST reads the same Markdown files that GitHub shows. Furo carries its own
style sheets and scripts, so that no page asks a CDN for anything.

Mermaid: sphinxcontrib-mermaid loads its script from a CDN, or needs a browser to draw. The site uses
neither: a `mermaid` block stays a block of code, which reads as text.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "Fovea"
author = "The authors of Fovea"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
version = release

extensions = ["myst_parser"]
myst_heading_anchors = 4  # levels of headings that links such as models.md#roll-back may name
nitpicky = True  # every reference must have a target

# contributing.md shows CONTRIBUTING.md, and is left out as long as there is none.
exclude_patterns = [] if (ROOT / "CONTRIBUTING.md").exists() else ["contributing.md"]

html_theme = "furo"
html_title = f"Fovea {release}"
html_copy_source = False
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """Show `mermaid` blocks as plain text, since Pygments has no lexer for them, and allow empty globs."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", drop_empty_globs)


def drop_empty_globs(app: Sphinx, docname: str, source: list[str]) -> None:
    """Remove the patterns from the contents of index.md that match no page: Sphinx would warn of them, and a
    strict build would fail before the page is written."""
    if docname == "index":
        lines = source[0].splitlines()
        source[0] = "\n".join(line for line in lines if not line.endswith("*") or _matches(app, line))


def _matches(app: Sphinx, pattern: str) -> bool:
    docs = Path(app.srcdir)
    return any(str(path.relative_to(docs)) not in exclude_patterns for path in docs.glob(f"{pattern}.md"))
