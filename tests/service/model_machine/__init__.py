"""A state machine test of model versions under random changes, requests and faults."""
