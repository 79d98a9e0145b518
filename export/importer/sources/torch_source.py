"""TorchScript and programs of torch.export: conversion in a child process. Pickles are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.answers import create_network
from fovea.export.importer.sources.archive import ArchiveKind
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import Source, SourceFacts

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of pickles. Files of TorchScript, which are archives, may have them too."""

_CHILD: Final = "fovea.export.importer.sources.torch_child"


def convert_torch_file(
    path: Path, kind: ArchiveKind, name: str | None, size: tuple[int, int] | None, work: Path
) -> Source:
    """Return TorchScript or a program of torch.export as ONNX.

    `size`, height and width in pixels, is that of the option `--crop`: the files do not state the size. A
    graph of TorchScript without it takes images of any size. Raises `ImportRefused`.
    """
    file = work / "converted.onnx"
    action = "script" if kind is ArchiveKind.TORCHSCRIPT else "program"
    sides = (str(size[0]), str(size[1])) if size else ("0", "0")
    run_converter(_CHILD, [action, path, *sides, file], what=str(path))
    network = create_network(_CHILD, (action, path), str(path), work)
    return Source(file, path.name, str(path), SourceFacts(name), work, network=network, original=path)


def is_pickle(start: bytes, path: Path) -> bool:
    """Return whether a file that is no archive is a pickle, by its first bytes or by its name."""
    return re.match(rb"\x80[\x02-\x05]", start) is not None or path.suffix in PICKLE_SUFFIXES


def refuse_pickle(path: Path) -> None:
    """Raise `ImportRefused` with a sentence on how to convert the file."""
    raise ImportRefused(
        f"{path} is a pickle, which Fovea never loads, because a pickle can run any program; convert it "
        "where you trust it: torch.onnx.export(model.eval(), (torch.zeros(1, 3, 224, 224),), 'model.onnx'), "
        "or `yolo export model=FILE format=onnx` for Ultralytics"
    )
