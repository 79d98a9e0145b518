"""ZIP archives with a model: an export of Azure Custom Vision, and files of PyTorch and Keras."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Final

from fovea.export.importer.foreign_model import MAX_BYTES, ImportRefused

_MAX_MEMBERS: Final = 20_000
_READ_SUFFIXES: Final = (".onnx", ".txt", ".json", ".manifest", ".data", ".onnx_data", ".tflite")
"""Files of an archive that are read; programs, notebooks and pictures are left out."""

ARCHIVE_ERRORS: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""Errors of `zipfile` for archives that are damaged, encrypted or of a kind that it does not know."""


class ArchiveKind(Enum):
    """The tool that wrote an archive."""

    MODEL_FOLDER = "a folder with an ONNX file"
    TORCHSCRIPT = "TorchScript"
    EXPORTED_PROGRAM = "a program of torch.export"
    PICKLE = "a pickle of PyTorch"
    KERAS = "a model of Keras"
    TEACHABLE_MACHINE = "an export of Teachable Machine"
    TEACHABLE_KERAS = "an export of Teachable Machine with a model of Keras"
    OTHER = "another archive"


def find_archive_kind(path: Path) -> ArchiveKind:
    """Return the kind of a ZIP archive by the names of its files.

    Raises `ImportRefused` if the archive is damaged.
    """
    names = [PurePosixPath(one.filename) for one in _list_members(path)]
    last_parts = {name.name for name in names}
    suffixes = {name.suffix for name in names}
    if ".onnx" in suffixes:
        return ArchiveKind.MODEL_FOLDER
    if ".tflite" in suffixes and "labels.txt" in last_parts:
        return ArchiveKind.TEACHABLE_MACHINE
    if {"keras_model.h5", "labels.txt"} <= last_parts:
        return ArchiveKind.TEACHABLE_KERAS
    if {"config.json", "metadata.json"} <= last_parts and "model.weights.h5" in last_parts:
        return ArchiveKind.KERAS
    if "archive_format" in last_parts or "serialized_exported_program.json" in last_parts:
        return ArchiveKind.EXPORTED_PROGRAM
    if "constants.pkl" in last_parts and any("code" in name.parts for name in names):
        return ArchiveKind.TORCHSCRIPT
    return ArchiveKind.PICKLE if "data.pkl" in last_parts else ArchiveKind.OTHER


def extract_model(path: Path, folder: Path, suffix: str = ".onnx") -> Path:
    """Extract the model, labels and metadata into `folder`; return the folder with the file of the model.

    `suffix` is that of the model. Raises `ImportRefused`.
    """
    members = [
        one
        for one in _list_members(path)
        if one.filename.endswith(_READ_SUFFIXES) and not one.is_dir() and "__MACOSX" not in one.filename
    ]
    size = sum(one.file_size for one in members)
    if size > MAX_BYTES:
        raise ImportRefused(f"{path} holds {size / 1e9:.1f} GB; at most 2 GB fit into one ONNX file")
    with zipfile.ZipFile(path) as archive:
        for one in members:
            try:
                archive.extract(one, folder)  # which removes `..` and absolute paths from the names
            except (*ARCHIVE_ERRORS, OSError) as error:
                if (
                    isinstance(error, OSError) and error.errno is not None
                ):  # of the disk, not of a decompressor
                    raise
                raise ImportRefused(f"{path} is damaged or encrypted at {one.filename}: {error}") from None
    files = sorted(folder.rglob(f"*{suffix}"), key=lambda one: len(one.parts))
    if not files:
        raise ImportRefused(f"{path} has no file {suffix}")
    return files[0].parent


def _list_members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except ARCHIVE_ERRORS as error:
        raise ImportRefused(f"{path} is a damaged ZIP archive ({error}); copy or download it again") from None
    if len(members) > _MAX_MEMBERS:
        raise ImportRefused(f"{path} has {len(members)} files; a model has at most {_MAX_MEMBERS}")
    return members
