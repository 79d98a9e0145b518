"""Prometheus metrics of the service, its processes and its container."""
