"""The wire dialects: each file translates one of them to the core call and back, and nothing else."""
