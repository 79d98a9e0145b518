"""The service: an ONNX image classifier behind HTTP. Never imports torch, onnx, model or export."""

import os

__version__ = "0.1.1"

# ONNX Runtime's wheels report usage to their maker, from the moment of their import, unless they are told
# not to. Who serves other people's photographs talks to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
