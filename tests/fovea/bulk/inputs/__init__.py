"""Tests of the sources of bulk classification."""
