"""Evaluation and calibration of trained networks."""
