"""Processors and memory that this process may use, and what takes them."""
