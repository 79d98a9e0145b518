"""Environment variables that are settings: without Kubernetes' variables, and with `PORT` as a fallback."""

from __future__ import annotations

import os
import re
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

PLATFORM_PORT: Final = "PORT"
"""Environment variable by which many platforms specify the port of a service."""


class EnvironmentSource(EnvSettingsSource):
    """The environment without Kubernetes' variables, with `PORT` as a fallback for `FOVEA_PORT`."""

    def __init__(self, settings_class: type[BaseSettings]) -> None:
        super().__init__(settings_class)
        variables = {
            name: value
            for name, value in self.env_vars.items()
            if not is_kubernetes_variable(name, value or "")
        }
        if os.environ.get(PLATFORM_PORT):
            variables.setdefault(PORT_SETTING.lower(), os.environ[PLATFORM_PORT])
        self.env_vars = variables


def read_own_port() -> str:
    """Return `FOVEA_PORT` in any letter case; empty if it is not set or comes from Kubernetes."""
    for name, value in os.environ.items():
        if name.upper() == PORT_SETTING and not is_kubernetes_variable(name, value):
            return value
    return ""


def is_kubernetes_variable(name: str, value: str) -> bool:
    """Return whether Kubernetes or Docker sets this variable for a Service or link named `fovea`."""
    return any(
        names.fullmatch(name.upper()) and values.fullmatch(value) for names, values in _KUBERNETES_VARIABLES
    )
