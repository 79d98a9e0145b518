"""Tests. The service comes first: it says how ONNX Runtime is to be imported."""

import fovea.service  # noqa: F401
