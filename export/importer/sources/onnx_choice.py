"""The choice of one ONNX file among those of a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from fovea.export.importer.foreign_model import ImportRefused

_USUAL_FILES: Final = ("onnx/model.onnx", "model.onnx")
"""Files of optimum, `onnx-community` and `Xenova`, in full precision."""

_MAX_LISTED: Final = 12


def choose_onnx_file(origin: str, sizes: Mapping[str, int | None], choice: str | None) -> str | None:
    """Return the name of the ONNX file to import, or None if the source has none.

    `sizes` maps the names of all files in the source to bytes. `choice` is the option `--file`: a name, the
    last part of a name, or a precision such as `fp16` for `onnx/model_fp16.onnx`. Raises `ImportRefused` if
    the choice is not unique.
    """
    names = sorted(name for name in sizes if name.endswith(".onnx"))
    if choice is not None:
        matches = [name for name in names if _matches(name, choice)]
        if len(matches) == 1:
            return matches[0]
        what = "has no ONNX file" if not matches else "has several files"
        raise ImportRefused(f"{origin} {what} {choice!r}; it has {_list_files(names, sizes)}")
    for name in _USUAL_FILES:
        if name in names:
            return name
    if len(names) > 1:
        raise ImportRefused(
            f"{origin} has {len(names)} ONNX files: {_list_files(names, sizes)}; choose one with "
            f"--file, such as --file {names[0]}"
        )
    return names[0] if names else None


def _matches(name: str, choice: str) -> bool:
    path = PurePosixPath(name)
    return choice in (name, path.name, path.stem, path.stem.removeprefix("model_"))


def _list_files(names: list[str], sizes: Mapping[str, int | None]) -> str:
    if not names:
        return "no ONNX file"
    texts = [name if (size := sizes[name]) is None else f"{name} ({size / 1e6:.1f} MB)" for name in names]
    more = len(texts) - _MAX_LISTED
    return ", ".join(texts[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
