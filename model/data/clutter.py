"""Hidden files and system files among the user's files."""

from __future__ import annotations

from fovea.service.image_folders import is_clutter


def find_clutter(name: str) -> str | None:
    """Return the kind of the first hidden or system file or folder on a path, or None."""
    *folders, file = name.split("/")
    for folder in folders:
        if is_clutter(folder):
            return f"in {folder}/"
    if not is_clutter(file):
        return None
    return "._*" if file.startswith("._") else file
