"""Fovea's own protocol."""
