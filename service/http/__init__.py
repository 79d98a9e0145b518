"""Connections, requests and their log."""
