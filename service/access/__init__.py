"""Callers of the service: API keys, their scopes, and what each caller may do."""
