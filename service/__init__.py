"""An ONNX image classification service over HTTP.

The package never imports torch, onnx, model or export.
"""

import os

__version__ = "0.1.1"

# ONNX Runtime's wheels send usage data to their vendor from the moment of import unless this variable is set.
# A service that receives other people's photographs must not contact anyone, so the variable is set before
# the first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
