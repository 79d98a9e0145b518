"""Loaded models and admission control."""
