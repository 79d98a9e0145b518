"""The files of an import: model, report and model card appear together, or not at all."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto

from fovea.export.from_checkpoint import REPORT_FILE, embed_contract
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.sources.origins import create_card
from fovea.export.model_card import render_model_card
from fovea.service.artifact.contract import Contract
from fovea.service.artifact.model_card import CARD_FILE
from fovea.service.artifact.new_version import add_version
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.atomic_files import WriteError

if TYPE_CHECKING:
    from fovea.export.importer.pipeline import ImportReport


def write_import(
    request: ImportRequest, report: ImportReport, contract: Contract, content: bytes
) -> ImportReport:
    """Add the version to the repository. Return the report with the version that it got.

    `content` is the whole model with the contract. Raises `WriteError`, and then leaves no file.
    """

    def write_files(folder: Path, version: str) -> None:
        nonlocal report, content
        if version != report.version:  # another program has just added a version
            new_contract = replace(contract, version=version)
            content = embed_contract(ModelProto.FromString(content), new_contract)
            report = replace(report, version=version, bytes=len(content))
        card = render_model_card(replace(contract, version=version), create_card(request))
        (folder / MODEL_FILE).write_bytes(content)
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    folder = request.out / request.name
    had_repository = request.out.exists()
    try:
        add_version(folder, write_files)
    except OSError as error:
        if not had_repository:
            with suppress(OSError):  # another program has added a model
                request.out.rmdir()
        raise WriteError(f"cannot write {folder}: {error.strerror}; nothing was written") from None
    return report
