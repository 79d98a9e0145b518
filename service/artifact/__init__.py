"""Model files: the contract inside them, their repository, and what a model accepts."""
