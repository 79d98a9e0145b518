"""Training of image classifiers in PyTorch, from images to a checkpoint."""
