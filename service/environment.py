"""Environment variables that are settings: without those of Kubernetes, and with those of cloud platforms."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic_settings import BaseSettings, EnvSettingsSource

_KUBERNETES_VARIABLES: Final = tuple(
    (re.compile(rf"FOVEA(_[A-Z0-9_]+)?_{name}"), re.compile(value))
    for name, value in (
        ("SERVICE_HOST", r"[0-9.]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+"),
        ("SERVICE_PORT(_[A-Z0-9_]+)?", r"\d{1,5}"),
        ("PORT", r"(tcp|udp|sctp)://.+"),
        (r"PORT_\d+_(TCP|UDP|SCTP)", r"(tcp|udp|sctp)://.+"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_PROTO", "tcp|udp|sctp"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_PORT", r"\d{1,5}"),
        (r"PORT_\d+_(TCP|UDP|SCTP)_ADDR", r"[0-9.]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+"),
    )
)
"""Patterns for the names and values of variables that are not settings.

Kubernetes sets such variables in every pod beside a Service named `fovea` or `fovea-…` (pkg/kubelet/envvars),
and so do Docker's links. One of them, `FOVEA_PORT`, has the name of a setting.
"""

PORT_SETTING: Final = "FOVEA_PORT"

MODELS_SETTING: Final = "FOVEA_MODELS"

PLATFORM_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    PORT_SETTING: ("AIP_HTTP_PORT", "PORT"),
    MODELS_SETTING: ("AIP_STORAGE_URI",),
    "FOVEA_HEALTH_ROUTE": ("AIP_HEALTH_ROUTE",),
    "FOVEA_PREDICT_ROUTE": ("AIP_PREDICT_ROUTE",),
}
"""Variables of platforms that stand in for a setting of the service that is not set, the strongest first.

`PORT` is known to Cloud Run, Knative and many others; `AIP_*` are Vertex AI's.
"""

SAGEMAKER_FOLDER: Final = Path("/opt/ml/model")
"""Folder into which SageMaker unpacks the model. Its presence tells that SageMaker runs the container."""

SAGEMAKER_PORT: Final = "8080"


class EnvironmentSource(EnvSettingsSource):
    """The environment without Kubernetes' variables."""

    def __init__(self, settings_class: type[BaseSettings]) -> None:
        super().__init__(settings_class)
        self.env_vars = {
            name: value
            for name, value in self.env_vars.items()
            if not is_kubernetes_variable(name, value or "")
        }


def read_platform_settings() -> dict[str, str]:
    """Return the settings that a platform gives to the service, as text, by the settings' names.

    Settings that are set by their own names are left out. Commands other than `fovea serve` do not use these
    settings: nobody calls them as a platform does, and a folder or a variable may be there by chance.
    """
    settings = read_sagemaker_settings()
    for setting in PLATFORM_VARIABLES:
        if name := find_platform_variable(setting):
            settings[setting] = os.environ[name]
    return {setting: value for setting, value in settings.items() if not has_own_variable(setting)}


def find_platform_variable(setting: str) -> str | None:
    """Return the name of the platform's variable that stands in for a setting, if one is set."""
    return next((name for name in PLATFORM_VARIABLES.get(setting, ()) if os.environ.get(name)), None)


def read_sagemaker_settings() -> dict[str, str]:
    """Return the settings that SageMaker expects, as text; empty elsewhere.

    SageMaker sets no variable for them: the port is fixed, and the model lies in a fixed folder.
    """
    try:
        if not SAGEMAKER_FOLDER.is_dir():
            return {}
    except OSError:  # from Python 3.12 on, if the folder above may not be searched
        return {}
    settings = {PORT_SETTING: SAGEMAKER_PORT}
    try:
        has_model = any(not one.name.startswith(".") for one in SAGEMAKER_FOLDER.iterdir())
    except OSError:
        has_model = True  # the start says what is wrong with the folder
    if has_model:  # without model data, the image brings its model along
        settings[MODELS_SETTING] = str(SAGEMAKER_FOLDER)
    return settings


def has_own_variable(setting: str) -> bool:
    """Return True if a setting is set by its own name, in any letter case, and not by Kubernetes."""
    return any(
        name.upper() == setting and value and not is_kubernetes_variable(name, value)
        for name, value in os.environ.items()
    )


def name_variable(setting: str, value: object) -> str:
    """Return the name of the variable that gave a setting its value, for messages."""
    name = find_platform_variable(setting)
    if name is None or has_own_variable(setting) or os.environ[name].rstrip("/") != str(value).rstrip("/"):
        return setting
    return name


def is_kubernetes_variable(name: str, value: str) -> bool:
    """Return whether Kubernetes or Docker sets this variable for a Service or link named `fovea`."""
    return any(
        names.fullmatch(name.upper()) and values.fullmatch(value) for names, values in _KUBERNETES_VARIABLES
    )
