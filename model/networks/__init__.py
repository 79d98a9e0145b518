"""Network definitions, pretrained weights and checkpoints."""
