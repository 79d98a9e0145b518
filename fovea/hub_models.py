"""Models of the Hugging Face hub for `fovea.load`: imported once for each commit, and kept in a cache.

The packages of the extras `hub` and `train` are needed, for a cached model too.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Final

from fovea.service.artifact.contract import FORMAT_VERSION
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.errors import FoveaError, ModelError

HUB_PREFIX: Final = "hf:"

_KEY_DIGITS: Final = 16


def find_hub_model(source: str) -> Path:
    """Return the version folder of `hf:OWNER/MODEL[@REVISION]`, imported now if it is not in the cache.

    The cache is the folder `fovea/hub` in `XDG_CACHE_HOME`, by default `~/.cache`. Raises `ModelError`, and
    then leaves no model in the cache.
    """
    try:
        # `pipeline` needs every package of an import.
        from fovea.export.importer import pipeline  # noqa: F401
        from fovea.export.importer.sources.hub import pin_reference
    except ImportError as error:
        raise ModelError(
            f"{source} needs {error.name}: pip install 'fovea-serve[hub,train]', or import the model on "
            "another machine with `fovea import`, and load the result"
        ) from None
    try:
        pinned = pin_reference(source)
        key = sha256(f"{pinned} {FORMAT_VERSION}".encode()).hexdigest()[:_KEY_DIGITS]
        folder = _find_cache() / key
        return _find_version(folder) or _import(source, pinned, folder)
    except ModelError:
        raise
    except FoveaError as error:
        raise ModelError(str(error)) from None


def _find_cache() -> Path:
    """Return the folder of the cache, which need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fovea" / "hub"


def _find_version(repository: Path) -> Path | None:
    """Return the first complete version in a repository of one model, if there is one."""
    return next((path.parent for path in sorted(repository.glob(f"*/*/{MODEL_FILE}"))), None)


def _import(source: str, pinned: str, repository: Path) -> Path:
    """Import a pinned source. Another process that does the same at the same time adds a second version."""
    from fovea.export.importer.pipeline import import_model
    from fovea.export.importer.preprocessing import PreprocessingOptions
    from fovea.export.importer.sources.completion import GivenOptions, complete_request
    from fovea.export.importer.sources.resolve import resolve_source

    options = GivenOptions(
        out=repository, preprocessing=PreprocessingOptions(), command=f"fovea import {source}"
    )
    with resolve_source(pinned) as resolved_source:
        import_model(complete_request(options, resolved_source))
    version = _find_version(repository)
    if version is None:
        raise ModelError(f"{repository} was emptied while {source} was imported; try again")
    return version
