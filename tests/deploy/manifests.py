"""Strict validation of Kubernetes objects, also of kinds that Kubernetes itself does not have."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.deploy.chart_files import CHART
from tests.deploy.conftest import HELM

Manifest = dict[str, Any]

SCHEMAS: Final = Path(__file__).parent / "schemas"

NEWEST_KUBERNETES: Final = "1.37.0"
"""Newest version of which `kubernetes-validate` has schemas."""

_POD_PARTS: Final = {"ClusterServingRuntime": ("containers", "volumes")}
"""Fields in `spec` that are those of a Pod's `spec`."""


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Helm in the folder of the chart."""
    assert HELM is not None
    return subprocess.run([HELM, *arguments], cwd=CHART, capture_output=True, text=True, check=False)


def render_chart(values: Manifest | None = None, *options: str, name: str = "fovea") -> list[Manifest]:
    """Return the objects that the chart makes of these values.

    Raises `AssertionError` with Helm's message if the values are refused.
    """
    pairs = [f"{key}={json.dumps(value)}" for key, value in (values or {}).items()]
    words = [word for pair in pairs for word in ("--set-json", pair)]
    process = run_helm("template", name, ".", "--namespace", "photos", *words, *options)
    assert process.returncode == 0, process.stderr
    return [manifest for manifest in yaml.safe_load_all(process.stdout) if manifest]


def get_manifest(manifests: Iterable[Manifest], kind: str) -> Manifest:
    """Return the only object of a kind."""
    (manifest,) = (one for one in manifests if one["kind"] == kind)
    return manifest


def validate_manifest(manifest: Manifest, version: str = NEWEST_KUBERNETES) -> None:
    """Validate an object against the schemas of a version of Kubernetes, or against a schema of ours.

    Raises `LookupError` for an object without a schema, and `ValidationError` for an unknown field or a wrong
    value.
    """
    import jsonschema
    import kubernetes_validate

    kind = manifest["kind"]
    path = SCHEMAS / f"{kind}.json"
    if not path.exists():
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            raise LookupError(f"there is no schema of {kind}; add tests/deploy/schemas/{kind}.json") from None
        return
    jsonschema.Draft202012Validator(_read_schema(path)).validate(manifest)
    if parts := _POD_PARTS.get(kind):
        spec = {name: manifest["spec"][name] for name in parts if name in manifest["spec"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "part"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


@cache
def _read_schema(path: Path) -> Any:
    return json.loads(path.read_text())
