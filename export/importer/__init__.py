"""Import of ONNX files from elsewhere."""
