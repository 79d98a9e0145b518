"""Tests of the comparison with the names of folders."""
