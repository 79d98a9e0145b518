"""Draw the Mermaid diagrams of the documentation as SVG files: `make diagrams`, after `npm pack mermaid`.

The text of a diagram stays in its page, where GitHub draws it. The site shows the file `docs/diagrams/<digest
of the text>.svg` instead, so that it needs neither a network nor a script to read, and a build needs no
browser. A changed diagram has no file, and the strict build fails until it is drawn.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parent
FOLDER: Final = DOCS / "diagrams"

BLOCK: Final = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_OPTIONS: Final = {"startOnLoad": False, "theme": "neutral", "htmlLabels": False, "deterministicIds": True}
"""`htmlLabels` off: an SVG with HTML inside is not shown everywhere."""

_DRAW: Final = """async ([text, options]) => {
  mermaid.initialize(options);
  return (await mermaid.render("diagram", text)).svg;
}"""


def diagram_file(text: str) -> str:
    """Return the name of the file that shows this text."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.svg"


def list_diagrams() -> Iterator[str]:
    """Yield the text of every diagram in the pages."""
    for page in sorted(DOCS.rglob("*.md")):
        yield from BLOCK.findall(page.read_text())


def main(package: str) -> None:
    """Draw all diagrams with the script in `package`, the archive that `npm pack mermaid` writes."""
    from tests.page.browsers import launch_chromium  # only drawing needs a browser

    with tarfile.open(package) as archive:
        member = archive.extractfile("package/dist/mermaid.min.js")
        if member is None:
            raise SystemExit(f"{package} holds no dist/mermaid.min.js")
        script = member.read().decode()
    FOLDER.mkdir(exist_ok=True)
    diagrams = {diagram_file(text): text for text in list_diagrams()}
    with launch_chromium() as browser:
        page = browser.new_page()
        page.set_content("<body></body>")
        page.add_script_tag(content=script)
        for name, text in diagrams.items():
            svg: str = page.evaluate(_DRAW, [text, _OPTIONS])
            # White in both themes of the site: the text of a diagram is dark.
            svg = svg.replace('style="max-width', 'style="background: white; max-width', 1)
            (FOLDER / name).write_text(svg + "\n")
            print(f"{name}  {json.dumps(text.splitlines()[0])}")
    for old in FOLDER.glob("*.svg"):
        if old.name not in diagrams:
            old.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
