"""Fovea's native protocol."""
