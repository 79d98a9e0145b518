"""The log, the metrics, the dashboard and the documentation use the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fovea.service.observability.metrics import STAGES
from tests.conftest import ROOT
from tests.documents import list_pages, read_page
from tests.pictures import make_jpeg
from tests.servers import METRIC_SAMPLE, Server

LOG_ONLY_FIELDS = {
    "timestamp",
    "level",
    "event",
    "request_id",
    "trace_id",
    "method",
    "images",
    "image_errors",
    "left_out",
    "client",
    "peer",
    "warnings",
}
"""Fields that no metric has or needs."""


@pytest.fixture(scope="module")
def observed_names(
    small_zoo: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, set[str]], set[str]]:
    """Return the labels of each metric of a server, and the fields of its access log."""
    path = tmp_path_factory.mktemp("log") / "log"
    with (
        path.open("w") as log,
        Server({"stderr": log}, FOVEA_MODELS=str(small_zoo), FOVEA_LOG_REQUESTS="1") as server,
    ):
        for content in 3 * [make_jpeg(), b"nonsense"]:
            server.client.post(
                "/v1/classify", content=content, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
            )
        metrics: dict[str, set[str]] = {}
        for sample in METRIC_SAMPLE.finditer(server.client.get("/metrics").text):
            name = re.sub(r"_(total|bucket|sum|count)$", "", sample["name"])
            metrics.setdefault(name, set()).update(re.findall(r'(\w+)="', sample["labels"] or ""))
    fields: set[str] = set()
    for line in map(json.loads, path.read_text().splitlines()):
        if line["event"] == "request":
            fields |= set(line)
    return metrics, fields


def read_documented_fields() -> set[str]:
    """Return the log fields in the tables of the page on logging."""
    section = read_page("logging").split("## The log")[1].split("\n## ")[0]
    return {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }


def test_log_fields_are_metrics_or_labels(
    observed_names: tuple[dict[str, set[str]], set[str]],
) -> None:
    metrics, fields = observed_names
    labels = set().union(*metrics.values())
    for field in fields - LOG_ONLY_FIELDS:
        assert f"fovea_{field}" in metrics or field in labels, field
    assert metrics["fovea_requests"] == {"protocol", "route", "model", "status"} <= fields
    assert metrics["fovea_errors"] <= fields


def test_logging_page_lists_exactly_the_log_fields(
    observed_names: tuple[dict[str, set[str]], set[str]],
) -> None:
    _, fields = observed_names
    assert fields - {"timestamp", "level", "event"} <= read_documented_fields()
    optional_fields = {"left_out", "image_errors", "peer", "caller", "warnings"}
    assert read_documented_fields() - fields <= optional_fields


def test_stages_have_the_same_names_everywhere(server: Server) -> None:
    text = server.client.get("/metrics").text
    assert set(re.findall(r'fovea_stage_seconds_count\{stage="(\w+)"', text)) == set(STAGES)
    dashboard = (ROOT / "deploy" / "grafana" / "dashboards" / "fovea.json").read_text()
    assert "by (stage, le)" in dashboard or "by (le, stage)" in dashboard
    for name in ("logging", "metrics"):
        assert all(f"`{stage}`" in read_page(name) for stage in STAGES), name


def test_dashboard_groups_only_by_existing_labels(
    observed_names: tuple[dict[str, set[str]], set[str]],
) -> None:
    metrics, _ = observed_names
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "fovea.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    groups = [group for query in queries for group in re.findall(r"by \(([^)]*)\) \(\w+\((fovea_\w+)", query)]
    assert len(groups) > 10
    for labels, name in groups:
        existing_labels = metrics.get(re.sub(r"_(total|bucket|sum|count)$", "", name))
        assert existing_labels is None or set(labels.split(", ")) <= existing_labels, (labels, name)


def test_metrics_named_in_docs_and_deployment_exist(
    observed_names: tuple[dict[str, set[str]], set[str]],
) -> None:
    metrics, _ = observed_names
    conditional_metrics = {
        "fovea_caller_requests",  # where callers need keys
        "fovea_drift_psi", "fovea_drift_chance_psi",  # once the window is full
        "fovea_swap_flip_ratio", "fovea_swap_slowdown_ratio",  # once a version was tried
        "fovea_container_throttled_seconds", "fovea_container_memory_bytes",
        "fovea_container_memory_limit_bytes", "fovea_container_memory_working_set_bytes",
        "fovea_unknown_images",  # of models that tell
        "fovea_versions_refused",  # once there is one
        "fovea_worker_deaths",  # of several workers
    }  # fmt: skip
    deployed = (ROOT / "deploy/alerts.yml", ROOT / "deploy/grafana/dashboards/fovea.json")
    for path in (*list_pages(), *deployed):
        names = re.findall(r"\bfovea_[a-z_]+[a-z]\b", path.read_text())
        for name in names:
            assert re.sub(r"_(total|bucket|sum|count)$", "", name) in metrics.keys() | conditional_metrics, (
                path,
                name,
            )
    metrics_page = read_page("metrics")
    for name in metrics:
        if name.startswith("fovea_"):
            assert re.search(rf"`{name}(_total)?`", metrics_page), name
