"""The models that answer, and how much work is taken on."""
