"""Files elsewhere: object stores through fsspec, and images by https URL."""
