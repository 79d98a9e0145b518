"""Model files: the contract inside a file, the model repository, and the inputs of a model."""
