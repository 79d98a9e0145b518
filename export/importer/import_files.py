"""The files of an import: model, report and model card appear together, or not at all."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.sources.origins import create_card
from fovea.export.model_card import render_model_card
from fovea.export.model_output import REPORT_FILE
from fovea.service.artifact.contract import METADATA_KEY, Contract
from fovea.service.artifact.model_card import CARD_FILE
from fovea.service.artifact.new_version import add_version
from fovea.service.artifact.onnx_edit import replace_metadata
from fovea.service.artifact.repository import MODEL_FILE, record_default_model
from fovea.service.atomic_files import WriteError

if TYPE_CHECKING:
    from fovea.export.importer.pipeline import ImportReport


def write_import(
    request: ImportRequest,
    contract: Contract,
    write_model: Callable[[BinaryIO], None],
    verify: Callable[[Path], ImportReport],
) -> ImportReport:
    """Add the version to the repository. Return the report with the version that it got.

    `write_model` writes the whole model with the contract into an open file. `verify` checks this file, which
    is in a hidden folder until then. Both are called once. Raises `WriteError` and the errors of `verify`,
    and then leaves no file.
    """
    report: ImportReport | None = None

    def write_files(folder: Path, version: str) -> None:
        nonlocal report
        file = folder / MODEL_FILE
        if report is None:
            with file.open("wb") as target:
                write_model(target)
            report = verify(file)
        if version != report.version:  # another program has just added a version
            _replace_contract(file, replace(contract, version=version))
            report = replace(report, version=version, bytes=file.stat().st_size)
        card = render_model_card(replace(contract, version=version), create_card(request))
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        # Before the version appears: beside a second model, a model without this record is not the default.
        record_default_model(request.out)

    folder = request.out / request.name
    new_folders = [one for one in (request.out, *request.out.parents) if not one.exists()]
    try:
        add_version(folder, write_files)
    except BaseException as error:
        for one in new_folders:
            with suppress(OSError):  # another program has added a model
                one.rmdir()
        if isinstance(error, OSError):
            raise WriteError(f"cannot write {folder}: {error.strerror}; nothing was written") from None
        raise
    if report is None:
        raise RuntimeError("add_version has returned without files")
    return report


def _replace_contract(file: Path, contract: Contract) -> None:
    """Write a model file again with another contract."""
    new_file = file.with_suffix(".new")
    with file.open("rb") as source, new_file.open("wb") as target:
        content = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        target.writelines(replace_metadata(memoryview(content), {METADATA_KEY: contract.to_json()}))
    new_file.replace(file)
