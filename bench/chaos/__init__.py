"""The `make chaos` test: a service at half load under faults and misbehaving clients (see `__main__`)."""
