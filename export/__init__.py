"""Export of checkpoints and foreign models to verified, self-describing ONNX files."""
