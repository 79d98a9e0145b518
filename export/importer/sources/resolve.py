"""The kind of a source, and its resolution to an ONNX file with facts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.archive import ArchiveKind, extract_model, find_archive_kind
from fovea.export.importer.sources.facts import Source
from fovea.export.importer.sources.folder import read_folder, read_onnx_file, to_model_name
from fovea.export.importer.sources.hub import HUB_PREFIX, read_hub_repository
from fovea.export.importer.sources.keras_source import convert_keras_file
from fovea.export.importer.sources.tflite_metadata import IDENTIFIER
from fovea.export.importer.sources.tflite_source import (
    KERAS_MODEL,
    LABELS_FILE,
    TEACHABLE_MODELS,
    TFLITE_PREFIX,
    convert_teachable_machine,
    convert_tflite_file,
    find_teachable_model,
    find_tflite_model,
    refuse_keras_export,
)
from fovea.export.importer.sources.torch_source import convert_torch_file, is_pickle, refuse_pickle
from fovea.export.importer.sources.torchvision_source import TORCHVISION_PREFIX, read_torchvision_model

_TIMM_PREFIX: Final = "timm:"
_KERAS_PREFIX: Final = "keras:"


@contextmanager
def resolve_source(
    text: str, choice: str | None = None, size: tuple[int, int] | None = None
) -> Iterator[Source]:
    """Yield the source that `text` names; its temporary files are removed at the end.

    `choice` is the option `--file`, and `size` that of `--crop`: height and width in pixels, for formats that
    do not state them. Raises `ImportRefused`.
    """
    try:
        with TemporaryDirectory(prefix="fovea-import-") as folder:
            work = Path(folder)
            source = _resolve(text, work, choice, size)
            try:
                yield source
            except ImportRefused as error:
                raise type(error)(_name_files(str(error), source, work)) from None
    except OSError as error:
        if error.filename is None:
            raise ImportRefused(f"cannot read {text}: {error.strerror}") from None
        raise


def _resolve(text: str, work: Path, choice: str | None, size: tuple[int, int] | None) -> Source:
    if text.startswith(HUB_PREFIX):
        return read_hub_repository(text, work, choice)
    if text.startswith(_TIMM_PREFIX):  # timm's weights are on the hub, under the same name
        return read_hub_repository(f"{HUB_PREFIX}timm/{text.removeprefix(_TIMM_PREFIX)}", work, choice)
    if text.startswith(TORCHVISION_PREFIX):
        return read_torchvision_model(text, work)
    path = Path(text.removeprefix(_KERAS_PREFIX).removeprefix(TFLITE_PREFIX))
    if not path.exists():
        raise ImportRefused(_explain_missing_source(text))
    if path.is_dir() and choice is None and not any(path.rglob("*.onnx")):
        if find_teachable_model(path):
            return _read_teachable_machine(path, path, work)
        if (path / KERAS_MODEL).is_file() and (path / LABELS_FILE).is_file():
            refuse_keras_export(text)
        if model := find_tflite_model(path):
            return convert_tflite_file(model, to_model_name(path.absolute().name), work)
    if path.is_dir():
        return read_folder(path, work, choice)
    if not path.is_file():
        raise ImportRefused(f"{text} is neither a file nor a folder; copy the model to a file first")
    start = _read_start(path)
    kind = find_archive_kind(path) if start.startswith(b"PK\x03\x04") else None
    if kind is ArchiveKind.MODEL_FOLDER:
        folder = extract_model(path, work / "archive")
        source = read_folder(folder, work, choice, str(path))
        return replace(source, facts=replace(source.facts, name=to_model_name(path.stem)))
    if choice is not None:
        raise ImportRefused(f"--file chooses a file of a folder or a repository, and {text} is neither")
    if kind in (ArchiveKind.TORCHSCRIPT, ArchiveKind.EXPORTED_PROGRAM):
        return convert_torch_file(path, kind, to_model_name(path.stem), size, work)
    if kind is ArchiveKind.KERAS:
        return convert_keras_file(path, to_model_name(path.stem), work)
    if kind is ArchiveKind.TEACHABLE_KERAS:
        refuse_keras_export(text)
    if kind is ArchiveKind.TEACHABLE_MACHINE:
        return _read_teachable_machine(extract_model(path, work / "archive", ".tflite"), path, work)
    if start[4:8] == IDENTIFIER:
        return convert_tflite_file(path, to_model_name(path.stem), work)
    if kind is ArchiveKind.PICKLE or (kind is None and is_pickle(start, path)):
        refuse_pickle(path)
    return read_onnx_file(path, work)


def _read_teachable_machine(folder: Path, origin: Path, work: Path) -> Source:
    model = find_teachable_model(folder)
    if model is None:
        raise ImportRefused(
            f"{origin} has TFLite and {LABELS_FILE}, but no {' or '.join(TEACHABLE_MODELS)} beside it, as "
            "Teachable Machine writes them; import the .tflite file itself"
        )
    return convert_teachable_machine(model, str(origin), to_model_name(origin.absolute().stem), work)


def _read_start(path: Path) -> bytes:
    """Return the first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise ImportRefused(f"cannot read {path}: {error.strerror}") from None


def _explain_missing_source(text: str) -> str:
    """Return a sentence on a source that is neither a file nor a folder."""
    address = re.match(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)", text)
    if address:
        return f"{text} is a web page; write hf:{address[1]}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", text, re.ASCII) and not text.endswith(".onnx"):
        return f"there is no file or folder {text}; for a model on the Hugging Face hub, write hf:{text}"
    return f"cannot read {text}: No such file or directory"


def _name_files(message: str, source: Source, work: Path) -> str:
    """Return the message with names that the user knows, in place of temporary files."""
    labels = source.facts.labels
    if labels and labels.value.is_relative_to(work):
        message = message.replace(str(labels.value), f"{labels.origin} of {source.origin}")
    if "have a background class first; add" in message:
        message += ", or leave the class out with --drop-background"
    return message.replace(str(source.file), source.origin) if source.file.is_relative_to(work) else message
