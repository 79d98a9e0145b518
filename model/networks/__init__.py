"""Networks, their weights and their checkpoints."""
