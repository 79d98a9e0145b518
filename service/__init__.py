"""The service: an ONNX image classifier behind HTTP. Never imports torch, onnx, model or export."""

__version__ = "0.1.0"
