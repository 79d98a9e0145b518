"""Open Inference Protocol, as implemented by KServe and Triton."""
