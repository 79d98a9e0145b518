"""Rollout of new model versions: discovery, trial, switch, refusal and publication."""
