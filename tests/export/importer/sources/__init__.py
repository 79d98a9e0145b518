"""Tests of `export/importer/sources/`."""
