"""Batching, and the runner processes that decode images and run models."""
