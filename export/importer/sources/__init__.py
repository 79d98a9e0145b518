"""Sources of models: each resolves to an ONNX file and to the facts that the source states."""
