"""Batching, and the processes that decode images and run models."""
