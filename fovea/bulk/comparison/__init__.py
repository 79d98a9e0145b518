"""Comparison of a model's labels with the names of the folders that hold the images. Needs no PyTorch."""
