"""Data sets for training: sources, labels, decoding and splits."""
