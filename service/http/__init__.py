"""HTTP connections, request records and the access log."""
