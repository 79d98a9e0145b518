"""`fovea show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME or NAME/VERSION in the repository, or the path of a folder or model file; without a "
            "version, the version that a start would serve."
        ),
    ],
    models: Annotated[Path | None, typer.Option(help="Model repository [FOVEA_MODELS].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the contract as JSON.")] = False,
) -> None:
    """Describe one model by its contract: labels, input, task, calibration, accuracy and origin."""
    from fovea.service.artifact.contract_file import read_contract
    from fovea.service.errors import ModelError, to_one_line
    from fovea.service.model_display import format_path, show_contract
    from fovea.service.rollout.inventory import find_shown_file
    from fovea.service.settings import load_settings

    path = find_shown_file(model, load_settings(**({} if models is None else {"models": models})))
    try:
        contract = read_contract(path)
    except ModelError as error:
        raise ModelError(f"{format_path(path)}: {to_one_line(error)}") from None
    if as_json:
        print(contract.to_json())
    else:
        show_contract(contract, path)
