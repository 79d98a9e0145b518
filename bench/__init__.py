"""Load and ratio benchmarks: the share of the bare runtime's speed that remains over HTTP."""
