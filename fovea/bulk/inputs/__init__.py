"""Sources of many images: files, folders, patterns and archives become entries, one for each image."""

from fovea.bulk.inputs.sources import count_entries, list_entries

__all__ = ["count_entries", "list_entries"]
