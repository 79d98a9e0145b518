"""Open Inference Protocol, as KServe and Triton have it."""
