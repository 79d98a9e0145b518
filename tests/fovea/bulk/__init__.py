"""Tests of bulk classification."""
