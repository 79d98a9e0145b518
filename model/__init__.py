"""Training: an image classifier in PyTorch, from images to a checkpoint."""
