"""Sources of many images: files, folders, patterns, archives, tables, lists, stores and URLs.

`list_entries` turns sources into entries, one for each image.
"""

from fovea.bulk.inputs.sources import count_entries, list_entries

__all__ = ["count_entries", "list_entries"]
