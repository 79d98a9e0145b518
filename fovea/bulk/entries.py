"""An image to classify in bulk: its name in the table, and how to read it."""

from fovea.service.image_files import ImageEntry

__all__ = ["ImageEntry"]
