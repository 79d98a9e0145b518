"""Tests of files elsewhere."""
