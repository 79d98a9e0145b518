"""Tests. The service is imported first, because it determines how ONNX Runtime is imported."""

import fovea.service  # noqa: F401
