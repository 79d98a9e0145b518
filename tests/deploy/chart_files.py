"""Files of the Helm chart that follow from others; `make chart` writes them.

* `files/alerts.yml` is a copy of `deploy/alerts.yml`, because Helm reads no file outside of the chart.
* `settings` in `values.schema.json` has every setting with its type and bounds.
* `env` in the same file refuses the settings that a template sets.
* `models.uri` in the same file knows the schemes of stores.
* `version` and `appVersion` in `Chart.yaml` are the version of the package.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fovea.service.remote.store_uri import STORE_SCHEMES
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.servers import ROOT

CHART: Final = ROOT / "deploy" / "helm" / "fovea"

FIXED_SETTINGS: Final = frozenset(
    {"port", "grpc_port", "models", "model_cache", "state", "keys", "tls_cert", "tls_key", "tls_client_ca"}
)
"""Settings that the chart's templates choose, by other values."""

_JSON_TYPES: Final = {bool: "boolean", int: "integer", float: "number"}
_JSON_BOUNDS: Final = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def render_chart_files() -> dict[str, str]:
    """Return the text of each derived file by its path in the chart."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = (CHART / "Chart.yaml").read_text()
    chart = re.sub(r"^version: .*$", f"version: {version}", chart, flags=re.MULTILINE)
    chart = re.sub(r"^appVersion: .*$", f'appVersion: "{version}"', chart, flags=re.MULTILINE)
    schema = json.loads((CHART / "values.schema.json").read_text())
    schema["properties"]["settings"] = make_settings_schema()
    variable = schema["properties"]["env"]["items"]["properties"]["name"]
    variable["not"]["enum"] = sorted(ENVIRONMENT_PREFIX + name.upper() for name in FIXED_SETTINGS)
    schema["properties"]["models"]["properties"]["uri"]["pattern"] = make_uri_pattern()
    return {
        "Chart.yaml": chart,
        "files/alerts.yml": (ROOT / "deploy" / "alerts.yml").read_text(),
        "values.schema.json": json.dumps(schema, indent=2) + "\n",
    }


def make_settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the value `settings`."""
    properties = {
        ENVIRONMENT_PREFIX + name.upper(): _make_field_schema(field)
        for name, field in sorted(Settings.model_fields.items())
        if name not in FIXED_SETTINGS
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def make_uri_pattern() -> str:
    """Return a pattern for URIs of stores that a pod can reach, without credentials, query and fragment."""
    schemes = "|".join(name for name in STORE_SCHEMES if name not in ("file", "memory"))
    return rf"^({schemes})://[^/:?#]+(/[^?#]*)?$"


def _make_field_schema(field: FieldInfo) -> dict[str, Any]:
    value_type: Any = field.annotation
    if get_origin(value_type) is Literal:
        return {"enum": list(get_args(value_type))}
    if value_type not in _JSON_TYPES:
        return {"type": "string"}
    bounds = {
        word: value
        for one in field.metadata
        for name, word in _JSON_BOUNDS.items()
        if (value := getattr(one, name, None)) is not None
    }
    return {"type": _JSON_TYPES[value_type], **bounds}


if __name__ == "__main__":
    for path, text in render_chart_files().items():
        (CHART / path).write_text(text)
