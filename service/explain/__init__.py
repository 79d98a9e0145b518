"""Explanations of answers: heat maps, layers and feature maps, computed in separate processes."""
