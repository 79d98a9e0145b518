"""The dashboard, its provisioning and docker-compose: queries of existing metrics, and files that agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.conftest import ROOT
from tests.deploy.conftest import EXTERNAL_METRICS, list_metric_names, needs_promtool
from tests.servers import Server

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "fovea.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$job": "fovea", "$model": ".*"}
RULES = ROOT / "deploy" / "alerts.yml"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def fill_variables(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


@needs_promtool
def test_every_query_is_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": fill_variables(query)} for number, query in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    process = subprocess.run(
        ["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert len(QUERIES) > 20


def test_queries_name_only_existing_metrics() -> None:
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    existing_metrics = list_metric_names() | recorded
    for query in QUERIES:
        names = set(re.findall(r"\b(?:fovea|process)_\w+|\bfovea:\S+?(?=\{)|\bup\b", query))
        assert names, query
        assert names <= existing_metrics, query


@pytest.mark.parametrize(
    ("metric", "selector"),
    [
        ("fovea_requests_total", 'model!=""'),
        ("fovea_requests_total", 'status=~"[45].."'),
        ("fovea_request_seconds_bucket", 'model!=""'),
    ],
)
def test_dashboard_groups_metric_by_protocol(metric: str, selector: str) -> None:
    queries = [query for query in QUERIES if re.search(r"by \([^)]*\bprotocol\b", query)]
    assert any(f"{metric}{{" in query and selector in query for query in queries)


def test_process_metrics_are_exported(server: Server) -> None:
    text = server.client.get("/metrics").text
    for name in EXTERNAL_METRICS:
        if name.startswith("process"):
            assert f"# TYPE {name} " in text


HERE = 'job="fovea", instance="fovea:8000"'
BY_PANEL = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in PANELS}


def _make_rising_series(name: str, more_labels: str, **values: float) -> dict[str, str]:
    """Return counters with their rise per minute; `values` has it for each suffix of the name."""
    return {
        f"{name}_{end.partition('__')[0]}{{{HERE}{more_labels}{_bucket_label(end)}}}": f"0+{value:g}x120"
        for end, value in values.items()
    }


def _bucket_label(end: str) -> str:
    edge = end.partition("__")[2]
    return f', le="{edge}"' if edge else ""


IMAGES_OF_32_PIXELS = {
    name: values
    for side in ("width", "height")
    for name, values in _make_rising_series(
        "fovea_image_pixels", f', side="{side}"', bucket__32=60, bucket__64=60, sum=1920, count=60
    ).items()
}
CLASSIFICATIONS, FAILED_EXPLANATIONS = (
    f'fovea_requests_total{{{HERE}, route="/v1/{route}", model="pets", status="{status}"}}'
    for route, status in (("classify", "200"), ("explain", "503"))
)


@needs_promtool
@pytest.mark.parametrize(
    ("title", "series", "expected"),
    [
        ("Size of the images", IMAGES_OF_32_PIXELS, [{"side": "width"}, {"side": "height"}, 32.0]),
        (
            "Answered without a 5xx",
            {CLASSIFICATIONS: "0+10x120", FAILED_EXPLANATIONS: "0+10x120"},
            [{"job": "fovea"}, 1.0],
        ),
        ("Answered without a 5xx", {CLASSIFICATIONS: "0+10x120"}, [{"job": "fovea"}, 1.0]),
    ],
    ids=["images of 32 pixels", "explanations do not count", "nothing has failed yet"],
)
def test_panel_shows_the_expected_values(
    tmp_path: Path, title: str, series: dict[str, str], expected: list[Any]
) -> None:
    *labels, value = expected
    samples = [
        {
            "labels": "{" + ", ".join(f'{name}="{text}"' for name, text in label_values.items()) + "}",
            "value": value,
        }
        for label_values in labels
    ]
    query = fill_variables(BY_PANEL[title][0]).replace("[1m]", "[5m]")
    promtool_test = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": query, "eval_time": "90m", "exp_samples": samples}],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(promtool_test))
    process = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_integer_histograms_have_no_quantile_queries() -> None:
    """`histogram_quantile` interpolates inside a bucket: it gives 16.7 for images of 32 pixels."""
    for query in QUERIES:
        if "histogram_quantile" in query:
            assert not re.search(r"fovea_(batch_images|image_pixels|prediction_entropy)_bucket", query)


def test_objective_panels_use_the_alert_rules() -> None:
    """The panels exclude explanations, which take seconds, and use the recording rules where they exist."""
    (excluded,) = set(re.findall(r'route!~"[^"]+"', RULES.read_text()))
    for title in ("Answered without a 5xx", "Answered within a second", "Burn rate of the error budget"):
        assert all("fovea:" in query for query in BY_PANEL[title])
    for title in ("Time of a classification", "Time by protocol, 99 %"):
        assert all(excluded in query for query in BY_PANEL[title])


def test_labels_panel_shows_the_ten_most_frequent_labels() -> None:
    top_query, others_query = BY_PANEL["Labels"]
    assert "topk(10," in top_query
    assert "@ end()" in top_query  # the same ten labels over the whole range
    assert top_query in others_query


def test_memory_panel_prefers_container_memory() -> None:
    assert "process_resident" not in BY_PANEL["Memory"][0]
    assert all("unless" in query for query in BY_PANEL["Memory"] if "process_resident" in query)


def test_queries_use_exactly_the_known_variables() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {
        "__rate_interval",
        "__range",
    }
    assert {name for query in QUERIES for name in re.findall(r"\$(\w+)", query)} == known


def test_dashboard_rows_are_in_order_and_no_panels_overlap() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    expected_rows = [
        "Are users served?",
        "Where does the time go?",
        "What is full?",
        "What did the model say?",
    ]
    assert rows == expected_rows
    occupied_cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
        cells = {
            (position["x"] + x, position["y"] + y) for x in range(position["w"]) for y in range(position["h"])
        }
        assert not cells & occupied_cells, panel["title"]
        occupied_cells |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_provisioning_files_agree_with_each_other() -> None:
    sources, providers = (
        yaml.safe_load((GRAFANA / "provisioning" / name).read_text())
        for name in ("datasources/prometheus.yml", "dashboards/fovea.yml")
    )
    (source,), (provider,) = sources["datasources"], providers["providers"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    services = COMPOSE["services"]
    host = re.fullmatch(r"http://(\w+):9090", source["url"])
    assert host is not None
    assert host[1] in services
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_compose_services_are_pinned_limited_and_awaited() -> None:
    assert COMPOSE["services"].keys() == {"fovea", "prometheus", "grafana"}
    for name, service in COMPOSE["services"].items():
        assert re.search(r":(v?\d+\.\d+\.\d+|latest)$", service["image"])
        assert ("latest" in service["image"]) == ("build" in service)
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["cpus"]
        assert service["mem_limit"]
        for dependency in service.get("depends_on", {}).values():
            assert dependency == {"condition": "service_healthy"}
        for port in service["ports"]:
            assert port == "8000:8000" or port.startswith("127.0.0.1:")
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source


# --- keys and TLS --------------------------------------------------------------------------------


def test_secure_compose_changes_what_it_says() -> None:
    content = (ROOT / "deploy/docker-compose.secure.yml").read_text()
    secure: dict[str, Any] = yaml.safe_load(content)["services"]
    assert secure.keys() <= COMPOSE["services"].keys()
    environment = secure["fovea"]["environment"]
    settings = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    assert environment.keys() <= settings
    source, target, mode = secure["fovea"]["volumes"][0].split(":")
    assert mode == "ro"
    page = (ROOT / "docs" / "deployment.md").read_text()
    for value in environment.values():
        if value != "true":  # a file, which a command of the page makes
            assert value.startswith(f"{target}/")
            assert value.replace(target, source.removeprefix("./")) in page
    # Docker merges volumes by their targets: the other file takes the place of deploy/prometheus.yml.
    targets = {
        name: [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]
        for name, services in (("open", COMPOSE["services"]), ("secure", secure))
    }
    assert set(targets["open"]) & set(targets["secure"]) == {"/etc/prometheus/prometheus.yml"}


def test_secure_prometheus_differs_in_key_and_certificate() -> None:
    configuration, secure = (
        yaml.safe_load((ROOT / "deploy" / f"{name}.yml").read_text())
        for name in ("prometheus", "prometheus-secure")
    )
    job = secure["scrape_configs"][0]
    files = {job.pop("authorization")["credentials_file"], job.pop("tls_config")["ca_file"]}
    assert job.pop("scheme") == "https"
    assert secure == configuration
    page = (ROOT / "docs" / "deployment.md").read_text()
    for file in files:
        assert file.replace("/run/fovea/", "secrets/prometheus/") in page


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus", "prometheus-secure"])
def test_prometheus_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy" / f"{name}.yml", tmp_path)
    shutil.copy(ROOT / "deploy" / "alerts.yml", tmp_path)
    process = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", f"{name}.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
