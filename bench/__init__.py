"""Load and ratio benchmarks: how much of the bare runtime's speed is left behind HTTP."""
