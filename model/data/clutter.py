"""Hidden files and system files among the user's files."""

from __future__ import annotations

from typing import Final

_SYSTEM_NAMES: Final = frozenset(
    {
        "__macosx",
        "icon\r",
        "network trash folder",
        "temporary items",  # macOS
        "thumbs.db",
        "thumbs.db:encryptable",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "folder.ini",
        "picasa.ini",
        "$recycle.bin",
        "recycler",
        "recycled",
        "system volume information",
        "found.000",  # Windows
        "lost+found",  # ext4
        "@eadir",
        "@tmp",
        "@sharebin",
        "#recycle",
        "#snapshot",
        "#synctrash",  # Synology
        "@recycle",
        "@recently-snapshot",
        "@__thumb",
        "@upload_cache",  # QNAP
        "__pycache__",
    }
)
"""Names of system files and folders, in lower case; names that start with a dot count as hidden too."""


def find_clutter(name: str) -> str | None:
    """Return the kind of the first hidden or system file or folder on a path, or None."""
    *folders, file = name.split("/")
    for folder in folders:
        if _is_clutter(folder):
            return f"in {folder}/"
    if not _is_clutter(file):
        return None
    return "._*" if file.startswith("._") else file


def _is_clutter(name: str) -> bool:
    return name.lower() in _SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))
