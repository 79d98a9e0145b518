"""What is a setting, a metric, an error or a route is in the README, and what is not is not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from fovea.service.errors import RequestError
from fovea.service.observability.metrics import Metrics
from fovea.service.settings import PREFIX, Settings
from tests.servers import ROOT, Server

README = (ROOT / "README.md").read_text()


def test_every_setting_is_documented_and_no_other() -> None:
    real = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(rf"`({PREFIX}[A-Z_]+)`", README)) == real


def test_defaults_in_the_table_are_the_real_ones() -> None:
    rows = dict(re.findall(rf"^\| `{PREFIX}([A-Z_]+)` \|([^|]*)\|", README, re.MULTILINE))
    for name, field in Settings.model_fields.items():
        default = rows[name.upper()].strip().strip("`").replace(" ", "")
        assert default == _written(field.default), name


def _written(value: object) -> str:
    """As the environment would say it."""
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_metric_is_documented_and_no_other() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    suffix = {"counter": "_total"}
    real = {metric.name + suffix.get(metric.type, "") for metric in registry.collect()}
    assert set(re.findall(r"^\| `(fovea_[a-z_]+)`", README, re.MULTILINE)) == real


def test_every_error_code_is_documented_with_its_status() -> None:
    for error in _leaves(RequestError):
        assert re.search(rf"^\| {error.status} \|.*`{error.code}`", README, re.MULTILINE), error.code


def _leaves(error: type[RequestError]) -> Iterator[type[RequestError]]:
    for subclass in error.__subclasses__():
        if hasattr(subclass, "code"):
            yield subclass
        yield from _leaves(subclass)


def test_every_route_is_documented(server: Server) -> None:
    for path in server.client.get("/openapi.json").json()["paths"]:
        plain = path.replace("/versions/{version}", "").replace("/{version}", "")
        assert f"{plain}`" in README, path
