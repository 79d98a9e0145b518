"""Alerts fire on the expected series (by promtool), and their metrics and runbook lines exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.conftest import list_metric_names, needs_promtool

RULES = ROOT / "deploy" / "alerts.yml"
PARSED = yaml.safe_load(RULES.read_text())
ALERTS = {rule["alert"]: rule for group in PARSED["groups"] for rule in group["rules"] if "alert" in rule}

EXPRESSIONS = [rule["expr"] for group in PARSED["groups"] for rule in group["rules"]]

HERE = 'job="fovea", instance="fovea:8000"'
OK = f'fovea_requests_total{{{HERE}, route="/v1/classify", model="pets", status="200"}}'
FAILED = f'fovea_requests_total{{{HERE}, route="/v1/classify", model="pets", status="503"}}'
REFUSED = f'fovea_requests_total{{{HERE}, route="/v1/classify", model="pets", status="400"}}'
LEFT = f'fovea_requests_total{{{HERE}, route="/v1/classify", model="pets", status="0"}}'
QUICK = f'fovea_request_seconds_bucket{{{HERE}, route="/v1/classify", model="pets", le="1.0"}}'
ALL = f'fovea_request_seconds_count{{{HERE}, route="/v1/classify", model="pets"}}'
PROBED = f'fovea_requests_total{{{HERE}, route="/health/ready", model="", status="503"}}'


def format_series(name: str, **labels: str) -> str:
    """Return the selector of a series with the labels of the target."""
    return f"{name}{{{', '.join([HERE, *(f'{key}={value!r}' for key, value in labels.items())])}}}"


def format_counter(*parts: tuple[int, float]) -> str:
    """Return the promtool values of a counter; each part is a number of minutes and its rise per minute."""
    value, terms = 0.0, ["0"]
    for minutes, step in parts:
        terms.append(f"{value + step:g}+{step:g}x{minutes - 1}")
        value += step * minutes
    return " ".join(terms)


AVAILABILITY = ["FoveaAvailabilityBurnsFast", "FoveaAvailabilityBurnsSlowly"]
LATENCY = ["FoveaLatencyBurnsFast", "FoveaLatencyBurnsSlowly"]

UP = 'up{job="fovea", instance="fovea:8000"}'
IN_FLIGHT, LIMIT = format_series("fovea_images_in_flight"), format_series("fovea_images_limit")
INTERNAL, BAD_IMAGE = (
    format_series("fovea_errors_total", reason=reason) for reason in ("internal", "bad_image")
)
RUNNERS, EXPECTED = format_series("fovea_runners"), format_series("fovea_runners_expected")
WAITING = format_series("fovea_versions_refused", model="pets")
FALLBACK = format_series("fovea_provider_fallback", model="pets")
GOLDEN, OTHER = (
    format_series("fovea_runner_start_failures_total", reason=reason) for reason in ("golden", "other")
)
DEATHS, STARTED = format_series("fovea_runner_deaths_total"), format_series("process_start_time_seconds")
KILLED, HUNG = (format_series("fovea_worker_deaths_total", reason=reason) for reason in ("signal", "hung"))
WORKERS, EXPECTED_WORKERS = format_series("fovea_workers"), format_series("fovea_workers_expected")
CHANGED = {
    result: format_series("fovea_model_changes_total", model="pets", result=result)
    for result in ("refused", "loaded")
}
EXPIRY = format_series("fovea_tls_certificate_expiry_timestamp_seconds")
RELOADS = {
    result: format_series("fovea_tls_certificate_reloads_total", result=result) for result in ("ok", "failed")
}
KEYS_REFUSED = format_series("fovea_keys_reloads_total", result="failed")
PSI, CHANCE = (format_series(f"fovea_drift_{infix}psi", signal="label") for infix in ("", "chance_"))

BAD_HOUR = {OK: format_counter((420, 1000)), FAILED: format_counter((360, 0), (60, 50))}
OVER = {OK: format_counter((420, 1000)), FAILED: format_counter((320, 0), (60, 50), (40, 0))}
BAD_MINUTES = {OK: format_counter((4320, 1000)), FAILED: format_counter((4300, 0), (20, 50))}
SLOW_HOUR = {ALL: format_counter((420, 1000)), QUICK: format_counter((360, 1000), (60, 700))}

EXPLAINED = OK.replace("classify", "explain").replace("200", "503")
EXPLAINED_SECONDS = ALL.replace("classify", "explain")
BAD_EXPLANATIONS = {EXPLAINED: format_counter((420, 1000)), EXPLAINED_SECONDS: format_counter((420, 1000))}

CASES: list[tuple[str, Mapping[str, str], str, Sequence[str]]] = [
    ("a bad hour", BAD_HOUR, "420m", AVAILABILITY),
    ("a bad hour, over for 40 minutes", OVER, "420m", AVAILABILITY[1:]),
    (
        "two in a thousand fail for three days",
        {OK: format_counter((4320, 998)), FAILED: format_counter((4320, 2))},
        "4320m",
        AVAILABILITY[1:],
    ),
    (
        "one in two thousand fails",
        {OK: format_counter((4320, 1999)), FAILED: format_counter((4320, 1))},
        "4320m",
        [],
    ),
    (
        "one of three bad minutes",
        {OK: format_counter((420, 1000)), FAILED: format_counter((400, 0), (1, 10), (19, 0))},
        "420m",
        [],
    ),
    ("twenty bad minutes, which the long windows do not feel", BAD_MINUTES, "4320m", AVAILABILITY[:1]),
    (
        "a bad hour in which many leave",
        {**BAD_HOUR, LEFT: format_counter((420, 10_000))},
        "420m",
        AVAILABILITY,
    ),
    ("bad input", {OK: format_counter((120, 10)), REFUSED: format_counter((120, 1000))}, "120m", []),
    ("clients leave", {OK: format_counter((120, 10)), LEFT: format_counter((120, 1000))}, "120m", []),
    (
        "probes during a start",
        {OK: format_counter((120, 10)), PROBED: format_counter((120, 1000))},
        "120m",
        [],
    ),
    ("explanations fail and are slow", {**BAD_EXPLANATIONS, OK: format_counter((420, 1000))}, "420m", []),
    ("nobody asks", {OK: format_counter((120, 0)), FAILED: format_counter((120, 0))}, "120m", []),
    ("a slow hour", SLOW_HOUR, "420m", LATENCY),
    (
        "one in two hundred is slow",
        {ALL: format_counter((4320, 1000)), QUICK: format_counter((4320, 995))},
        "4320m",
        [],
    ),
    ("down", {UP: "1x9 0x10"}, "15m", ["FoveaDown"]),
    ("one scrape missed", {UP: "1x9 0 1x10"}, "10m", []),
    ("up", {UP: "1x20"}, "15m", []),
    ("no runner", {RUNNERS: "2x9 0x20", EXPECTED: "2x29"}, "15m", ["FoveaNoRunners"]),
    ("no runner for a moment", {RUNNERS: "2x9 0 2x10", EXPECTED: "2x29"}, "10m", []),
    ("a runner missing", {RUNNERS: "1x30", EXPECTED: "2x30"}, "15m", ["FoveaRunnersMissing"]),
    ("a runner being replaced", {RUNNERS: "2x9 1x5 2x20", EXPECTED: "2x30"}, "14m", []),
    ("no series of any service", {RUNNERS: "2x4 stale"}, "15m", ["FoveaAbsent"]),
    ("a version that is kept out since the start", {WAITING: "1x20"}, "15m", ["FoveaVersionRefused"]),
    ("no version that is kept out", {WAITING: "0x20"}, "15m", []),
    ("full", {IN_FLIGHT: "250x20", LIMIT: "256x20"}, "15m", ["FoveaQueueSaturated"]),
    ("full for a moment", {IN_FLIGHT: "10x9 250x2 10x20", LIMIT: "256x30"}, "12m", []),
    ("a bug", {INTERNAL: "0x10 1x20"}, "15m", ["FoveaInternalErrors"]),
    ("callers' errors", {BAD_IMAGE: format_counter((20, 9))}, "15m", []),
    ("a bug of yesterday", {INTERNAL: "0x10 1x60"}, "60m", []),
    ("on the CPU", {FALLBACK: "1x20"}, "15m", ["FoveaProviderFallback"]),
    ("on the CPU since this scrape", {FALLBACK: "0x9 1x20"}, "10m", []),
    ("on the GPU", {FALLBACK: "0x20"}, "15m", []),
    ("a host that computes wrongly", {GOLDEN: "0x10 1x20"}, "15m", ["FoveaGoldenFailure"]),
    ("a model file that is gone", {OTHER: "0x10 1x20"}, "15m", []),
    ("three runners die", {DEATHS: "0x5 3x20"}, "15m", ["FoveaRunnersDie"]),
    ("one after the other", {DEATHS: "5x5 6x3 7x3 8x20"}, "15m", ["FoveaRunnersDie"]),
    ("two runners died", {DEATHS: "0x5 2x20"}, "15m", []),
    ("two runners died in a minute after the start", {DEATHS: "0 2"}, "1m", []),
    ("two before and two after a restart", {DEATHS: "0x5 2x3 0x2 2x20"}, "15m", []),
    ("three runners died long ago", {DEATHS: "0x5 3x60"}, "60m", []),
    ("three workers die, of two reasons", {KILLED: "0x5 1x20", HUNG: "0x7 2x20"}, "15m", ["FoveaWorkersDie"]),
    ("two workers died", {KILLED: "0x5 1x20", HUNG: "0x7 1x20"}, "15m", []),
    ("a worker is missing", {WORKERS: "4x5 3x20", EXPECTED_WORKERS: "4x30"}, "15m", ["FoveaWorkersMissing"]),
    ("a worker is replaced", {WORKERS: "4x5 3x2 4x20", EXPECTED_WORKERS: "4x30"}, "15m", []),
    ("restarts", {STARTED: "10x5 20x5 30x5 40x5"}, "20m", ["FoveaRestarts"]),
    ("one restart", {STARTED: "10x5 20x15"}, "20m", []),
    ("a certificate that expires in two days", {EXPIRY: "172800x20"}, "15m", ["FoveaCertificateExpires"]),
    ("a certificate that has expired", {EXPIRY: "1x20"}, "15m", ["FoveaCertificateExpires"]),
    ("a certificate for four days", {EXPIRY: "345600x20"}, "15m", []),
    ("no certificate", {EXPIRY: "0x20"}, "15m", []),
    ("a broken keys file", {KEYS_REFUSED: "0x10 1x20"}, "15m", ["FoveaKeysRefused"]),
    ("a wrong certificate", {RELOADS["failed"]: "0x10 1x20"}, "15m", ["FoveaCertificateRefused"]),
    ("a new certificate", {RELOADS["ok"]: "0x10 1x20", RELOADS["failed"]: "0x30"}, "15m", []),
    ("a version refused", {CHANGED["refused"]: "0x10 1x20"}, "15m", ["FoveaVersionRefused"]),
    ("a version loaded", {CHANGED["loaded"]: "0x10 1x20"}, "15m", []),
    ("a version refused yesterday", {CHANGED["refused"]: "0x10 1x60"}, "60m", []),
    ("drift", {PSI: "0.4x30", CHANCE: "0.01x30"}, "20m", ["FoveaDrift"]),
    ("drift that has just begun", {PSI: "0.02x25 0.4x9", CHANCE: "0.01x40"}, "30m", []),
    ("chance, of few held-out images", {PSI: "0.4x30", CHANCE: "0.2x30"}, "20m", []),
    ("no drift", {PSI: "0.02x30", CHANCE: "0.002x30"}, "20m", []),
]


@pytest.mark.long
@needs_promtool
@pytest.mark.parametrize(
    ("series", "eval_time", "alerts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_series_fire_exactly_the_expected_alerts(
    tmp_path: Path, series: Mapping[str, str], eval_time: str, alerts: Sequence[str]
) -> None:
    series = {RUNNERS: "2x4320", **series}  # without runners, an alert would fire
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts]
    promtool_test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "30m" if eval_time == "4320m" else "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": eval_time,
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(promtool_test))
    process = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_every_alert_fires_in_some_case() -> None:
    assert {name for *_, alerts in CASES for name in alerts} == ALERTS.keys()


def test_runbook_has_a_line_for_every_alert() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| `(Fovea\w+)` \|", operations, re.MULTILINE)) == ALERTS.keys()
    for rule in ALERTS.values():
        page, _, heading = rule["annotations"]["runbook"].partition("#")
        assert re.search(rf"^#+ {heading}$", (ROOT / page).read_text(), re.MULTILINE | re.IGNORECASE)


def test_rules_name_only_existing_metrics() -> None:
    names = set(re.findall(r"\b(?:fovea|process)_\w+|\bup\b", "\n".join(EXPRESSIONS)))
    assert names
    assert names <= list_metric_names()


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    config = ROOT / "deploy" / "prometheus.yml"
    assert (
        subprocess.run(["promtool", "check", "config", config], capture_output=True, check=False).returncode
        == 0
    )
