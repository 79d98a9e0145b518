"""The answers of a source's own pipeline, as a converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fovea.export.importer.sources.facts import ReferenceAnswers


def read_answers(file: Path) -> ReferenceAnswers:
    """Read the file that a converter has written for `answer`."""
    with np.load(file, allow_pickle=False) as arrays:
        return ReferenceAnswers(
            name=json.loads(str(arrays["name"])), values=arrays["values"], outputs=arrays.get("outputs")
        )
