"""Fovea: an image classification service, and the same models in Python.

    model = fovea.load("zoo/pets")
    result = model.classify("cat.jpg")

    client = fovea.Client("http://127.0.0.1:8000")
    result = client.classify("cat.jpg")

The names are imported on first use, so that the processes of the service, which import this package too, do
not pay for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fovea.batch_classifier import BatchClassifier
    from fovea.client import AsyncClient, Client
    from fovea.errors import FileError, FoveaError, ModelError, RequestError
    from fovea.images import ImageSource
    from fovea.local import Model, load
    from fovea.results import Prediction, Result
    from fovea.service import __version__

__all__ = [
    "AsyncClient",
    "BatchClassifier",
    "Client",
    "FileError",
    "FoveaError",
    "ImageSource",
    "Model",
    "ModelError",
    "Prediction",
    "RequestError",
    "Result",
    "__version__",
    "load",
]

_MODULES = {
    "AsyncClient": "fovea.client",
    "BatchClassifier": "fovea.batch_classifier",
    "Client": "fovea.client",
    "FileError": "fovea.errors",
    "FoveaError": "fovea.errors",
    "ImageSource": "fovea.images",
    "Model": "fovea.local",
    "ModelError": "fovea.errors",
    "Prediction": "fovea.results",
    "RequestError": "fovea.errors",
    "Result": "fovea.results",
    "__version__": "fovea.service",
    "load": "fovea.local",
}
"""Module of each public name."""

if not TYPE_CHECKING:  # type checkers would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Import a public name on first use (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        """Return the names in the module and the names that are not imported yet."""
        return sorted({*globals(), *__all__})
