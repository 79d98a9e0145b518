"""Metrics, and what this process costs."""
