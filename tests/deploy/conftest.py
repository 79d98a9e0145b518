"""Shared parts of the tests of `deploy/`."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.observability.metrics import Metrics
from tests.servers import ROOT
from tests.tools import SYSTEM_REASON

needs_promtool = pytest.mark.needs("promtool")

EXTERNAL_METRICS = {
    "up",  # defined by Prometheus
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "fovea_container_throttled_seconds_total",
    "fovea_container_memory_limit_bytes",
    "fovea_container_memory_working_set_bytes",
}
"""Metrics that `Metrics` does not define. A container's metrics exist only if it has such limits."""


def list_metric_names() -> set[str]:
    """Return every series that `/metrics` can have."""
    registry = CollectorRegistry()
    Metrics(registry)
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    names = {metric.name + end for metric in registry.collect() for end in suffixes.get(metric.type, ("",))}
    return names | EXTERNAL_METRICS


def find_helm() -> str | None:
    """Return the path of Helm: `HELM`, on the path, or where `make chart-test` has put it."""
    program = os.environ.get("HELM") or shutil.which("helm")
    downloaded = ROOT / "build" / "helm" / "helm" / "helm"
    return program or (str(downloaded) if downloaded.exists() else None)


HELM = find_helm()

HAS_VALIDATION = importlib.util.find_spec("kubernetes_validate") is not None

needs_validation = pytest.mark.skipif(
    not HAS_VALIDATION, reason=f"{SYSTEM_REASON}has no kubernetes-validate: make chart-test installs it"
)
"""Mark of tests that validate objects of Kubernetes."""

needs_helm = pytest.mark.skipif(
    HELM is None or not HAS_VALIDATION,
    reason=f"{SYSTEM_REASON}has no Helm or no kubernetes-validate: make chart-test installs both",
)
"""Mark of tests that render the chart."""
