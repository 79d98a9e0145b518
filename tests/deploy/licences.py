"""Write the licences of all packages in the images: `make licences`."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Final

from tests.servers import ROOT

PAGE: Final = ROOT / "docs" / "licences.md"

_INTRODUCTION: Final = """# Licences

The container images contain Fovea (MIT), its base image, and the packages below. `make licences` writes this
page from the lock files and from the metadata of the installed packages. A test compares both, and fails for
a licence that obliges you to publish your own code.

| package | licence |
|---|---|
"""

_GPU_TWINS: Final = {"onnxruntime-gpu": "onnxruntime"}
"""Packages of the CUDA image that are built from the code of another package."""

_SPDX: Final = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""SPDX identifiers of the names in older metadata."""


def list_locked_packages() -> list[str]:
    """Return the names of all packages in the images."""
    texts = [(ROOT / "deploy" / "image" / f"{target}.txt").read_text() for target in ("cpu", "cuda")]
    return sorted({name for text in texts for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)})


def find_licence(name: str) -> str | None:
    """Return the licence in a package's metadata; None if the package is not installed here."""
    try:
        metadata = distribution(_GPU_TWINS.get(name, name)).metadata
    except PackageNotFoundError:
        return None
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    classifiers = [
        one.rpartition(" :: ")[2]
        for one in metadata.get_all("Classifier") or ()
        if one.startswith("License ::")
    ]
    names = (
        [one for one in classifiers if one != "OSI Approved"] or metadata.get_all("License") or ["unknown"]
    )
    return " AND ".join(sorted({_SPDX.get(one, one) for one in names}))


def read_page() -> dict[str, str]:
    """Return the licence of each package on the page."""
    return dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)[1:])


def render_page() -> str:
    """Return the page. Raises `ValueError` if a package is not installed here, and never was on the page."""
    known = read_page() if PAGE.exists() else {}
    rows = []
    for name in list_locked_packages():
        licence = find_licence(name) or known.get(name)
        if licence is None:
            raise ValueError(f"{name} is not installed: pip install {name}")
        rows.append(f"| {name} | {licence} |\n")
    return _INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render_page())
