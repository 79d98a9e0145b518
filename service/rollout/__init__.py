"""New versions: how they are found, tried, switched to, refused and published."""
