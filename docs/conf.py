"""Configuration of the documentation site: `make docs` builds it into build/docs.

Why Sphinx: the site must build strictly, must read without a network, and must last. MkDocs Material gets
critical fixes only until 2027-05, and its successor is young. Sphinx is maintained, reports every broken
link as an error (`-n -W`), and MyST reads the same Markdown files that GitHub shows. Furo carries its own
style sheets and scripts, so that no page asks a CDN for anything.

Mermaid: sphinxcontrib-mermaid loads its script from a CDN, or needs a browser for every build. The site shows
the files that `docs/draw_diagrams.py` has drawn.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parent))  # where Sphinx does not look for modules

from draw_diagrams import BLOCK, diagram_file

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS: Final = Path(__file__).resolve().parent
ROOT: Final = DOCS.parent

COPIED: Final = {
    name: path
    for name, path in (("changelog", ROOT / "CHANGELOG.md"), ("contributing", ROOT / "CONTRIBUTING.md"))
    if path.exists()
}
"""Pages whose text is that of a file at the top of the repository."""

project = "Fovea"
author = "The authors of Fovea"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
version = release

extensions = ["myst_parser"]
myst_heading_anchors = 4  # levels of headings that links such as models.md#roll-back may name
nitpicky = True  # every reference must have a target
exclude_patterns = [f"{name}.md" for name in ("changelog", "contributing") if name not in COPIED]

html_theme = "furo"
html_title = f"Fovea {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """Adapt every page before it is read."""
    app.connect("source-read", prepare)


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adapt a page, which is written for GitHub, to the site."""
    page = DOCS / f"{docname}.md"
    origin = COPIED.get(docname, page)
    text = source[0]
    if origin != page:
        app.env.note_dependency(str(origin))
        text = origin.read_text()
    if docname == "index":
        text = "\n".join(line for line in text.splitlines() if not line.endswith("*") or _matches(line))
    text = BLOCK.sub(lambda block: f"![Diagram](/diagrams/{diagram_file(block[1])})", text)
    source[0] = _LINK.sub(lambda link: _adapted(link, origin.parent, page.parent), text)


_LINK: Final = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./-]+)((?:#[\w-]+)?)\)")


def _adapted(link: re.Match[str], origin: Path, folder: Path) -> str:
    """Let a link lead to the page of the site. A link to another file of the repository becomes its text.

    A link to nothing stays as it is, so that the build fails.
    """
    text, target, anchor = link.groups()
    path = Path(os.path.normpath(origin / target))
    if not path.exists():
        return link[0]
    for name, copied in COPIED.items():
        if path == copied:
            path = DOCS / f"{name}.md"
    return f"[{text}]({os.path.relpath(path, folder)}{anchor})" if path.is_relative_to(DOCS) else text


def _matches(pattern: str) -> bool:
    """Return whether a pattern in the table of contents matches a page.

    Sphinx warns of a pattern without a page, and the strict build would fail before the page is written.
    """
    return any(str(path.relative_to(DOCS)) not in exclude_patterns for path in DOCS.glob(f"{pattern}.md"))
