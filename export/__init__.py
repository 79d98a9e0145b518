"""The bridge from a checkpoint to one verified, self-describing ONNX file."""
