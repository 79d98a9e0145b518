"""A state machine test of model versions: random changes, requests and faults, and what must hold meanwhile."""
