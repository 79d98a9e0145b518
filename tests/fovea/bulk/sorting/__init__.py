"""Tests of sorting into folders."""
