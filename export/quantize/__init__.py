"""Quantization of a model version to int8 or float16, proven against the float model on images."""
