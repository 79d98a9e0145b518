"""Servers that the benchmark compares; each runs in an environment without Fovea's dependencies."""
