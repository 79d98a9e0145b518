"""The dashboard and what provisions it: queries that Prometheus can read, of metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    ended = subprocess.run(
        ["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert len(QUERIES) > 20


def test_every_query_names_a_metric_that_there_is() -> None:
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    real = list_metric_names() | recorded
    for query in QUERIES:
        named = set(re.findall(r"\b(?:fovea|process)_\w+|\bfovea:\S+?(?=\{)|\bup\b", query))
        assert named, query
        assert named <= real, query


@pytest.mark.parametrize(
    ("metric", "narrowed"),
    [
        ("fovea_requests_total", 'model!=""'),
        ("fovea_requests_total", 'status=~"[45].."'),
        ("fovea_request_seconds_bucket", 'model!=""'),
    ],
)
def test_requests_errors_and_times_are_told_by_protocol(metric: str, narrowed: str) -> None:
    grouped = [query for query in QUERIES if re.search(r"by \([^)]*\bprotocol\b", query)]
    assert any(f"{metric}{{" in query and narrowed in query for query in grouped)


def test_what_the_system_tells_is_really_there(server: Server) -> None:
    text = server.client.get("/metrics").text
    for name in EXTERNAL_METRICS:
        if name.startswith("process"):
            assert f"# TYPE {name} " in text


HERE = 'job="fovea", instance="fovea:8000"'
BY_PANEL = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in PANELS}


def _rising_series(name: str, more: str, **values: float) -> dict[str, str]:
    """Counters that rise by so much in each minute, by the end of their names."""
    return {
        f"{name}_{end.partition('__')[0]}{{{HERE}{more}{_bucket_label(end)}}}": f"0+{value:g}x120"
        for end, value in values.items()
    }


def _bucket_label(end: str) -> str:
    edge = end.partition("__")[2]
    return f', le="{edge}"' if edge else ""


OF_32 = {
    name: values
    for side in ("width", "height")
    for name, values in _rising_series(
        "fovea_image_pixels", f', side="{side}"', bucket__32=60, bucket__64=60, sum=1920, count=60
    ).items()
}
OF_10, OF_10_LOST = (
    f'fovea_requests_total{{{HERE}, route="/v1/{route}", model="pets", status="{status}"}}'
    for route, status in (("classify", "200"), ("explain", "503"))
)


@needs_promtool
@pytest.mark.parametrize(
    ("title", "series", "expected"),
    [
        ("Size of the images", OF_32, [{"side": "width"}, {"side": "height"}, 32.0]),
        ("Answered without a 5xx", {OF_10: "0+10x120", OF_10_LOST: "0+10x120"}, [{"job": "fovea"}, 1.0]),
        ("Answered without a 5xx", {OF_10: "0+10x120"}, [{"job": "fovea"}, 1.0]),
    ],
    ids=["images of 32 pixels", "explanations do not count", "nothing has failed yet"],
)
def test_a_panel_shows_what_was_counted(
    tmp_path: Path, title: str, series: dict[str, str], expected: list[Any]
) -> None:
    *labels, value = expected
    samples = [
        {"labels": "{" + ", ".join(f'{name}="{word}"' for name, word in one.items()) + "}", "value": value}
        for one in labels
    ]
    query = fill_variables(BY_PANEL[title][0]).replace("[1m]", "[5m]")
    test = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": query, "eval_time": "90m", "exp_samples": samples}],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    ended = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_no_quantile_is_made_up_inside_a_bucket_of_whole_numbers() -> None:
    """`histogram_quantile` draws a line through a bucket: 16.7 for images of 32 pixels."""
    for query in QUERIES:
        if "histogram_quantile" in query:
            assert not re.search(r"fovea_(batch_images|image_pixels|prediction_entropy)_bucket", query)


def test_objectives_are_drawn_as_they_are_alerted() -> None:
    """Without explanations, which take seconds by design; and from the rules, where those say the same."""
    (excluded,) = set(re.findall(r'route!~"[^"]+"', RULES.read_text()))
    for title in ("Answered without a 5xx", "Answered within a second", "Burn rate of the error budget"):
        assert all("fovea:" in query for query in BY_PANEL[title])
    for title in ("Time of a classification", "Time by protocol, 99 %"):
        assert all(excluded in query for query in BY_PANEL[title])


def test_the_labels_are_few_however_many_there_are() -> None:
    top, others = BY_PANEL["Labels"]
    assert "topk(10," in top
    assert "@ end()" in top  # the same ten at every moment
    assert top in others


def test_memory_is_compared_with_the_limit_of_what_the_limit_is_of() -> None:
    assert "process_resident" not in BY_PANEL["Memory"][0]
    assert all("unless" in query for query in BY_PANEL["Memory"] if "process_resident" in query)


def test_no_variable_is_unknown() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {
        "__rate_interval",
        "__range",
    }
    assert {name for query in QUERIES for name in re.findall(r"\$(\w+)", query)} == known


def test_it_is_read_from_top_to_bottom_and_nothing_overlaps() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    questions = ["Are users served?", "Where does the time go?", "What is full?", "What did the model say?"]
    assert rows == questions
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_what_provisions_it_fits_together() -> None:
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
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_every_service_is_pinned_bounded_and_waited_for() -> None:
    assert COMPOSE["services"].keys() == {"fovea", "prometheus", "grafana"}
    for name, service in COMPOSE["services"].items():
        assert re.search(r":(v?\d+\.\d+\.\d+|latest)$", service["image"])
        assert ("latest" in service["image"]) == ("build" in service)
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["cpus"], service["mem_limit"]
        for needed in service.get("depends_on", {}).values():
            assert needed == {"condition": "service_healthy"}
        for port in service["ports"]:
            assert port == "8000:8000" or port.startswith("127.0.0.1:")
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source
