"""Sorting of classified images into a folder for each label."""
