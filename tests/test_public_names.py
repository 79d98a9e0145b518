"""The list of all public names, so that a changed name shows in a diff.

`python -m tests.test_public_names` writes the list again. A changed or removed name needs a line under
"Changed" in the CHANGELOG, and an error or an alias that names the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from typer.main import get_command

from fovea.cli import app as command_line
from fovea.service.observability.metrics import Metrics
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.graphs import add_to_repository, build_model
from tests.servers import ROOT, Server

LIST = ROOT / "tests" / "public_names.txt"


def list_settings() -> Iterator[str]:
    """Yield the variables of the environment."""
    yield from (f"setting {ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.model_fields)


def list_metrics() -> Iterator[str]:
    """Yield the metrics with their labels."""
    registry = CollectorRegistry()
    Metrics(registry)
    for collector in list(registry._collector_to_names):
        labels = ",".join(getattr(collector, "_labelnames", ()))
        for metric in collector.collect():
            yield f"metric {metric.name} {metric.type} {labels}".rstrip()


def list_options() -> Iterator[str]:
    """Yield the commands, their arguments and options."""
    for name, command in sorted(get_command(command_line).commands.items()):  # type: ignore[attr-defined]
        for parameter in command.params:
            words = "/".join((*parameter.opts, *parameter.secondary_opts))
            yield f"command {name} {words}"


def list_routes(document: dict[str, Any]) -> Iterator[str]:
    """Yield the routes with their parameters, and the fields of all JSON that is described."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"route {method.upper()} {path}"
            for parameter in operation.get("parameters", ()):
                yield f"route {method.upper()} {path} {parameter['in']} {parameter['name']}"
    for name, schema in document["components"]["schemas"].items():
        yield from (f"field {name}.{field}" for field in schema.get("properties", ()))


def format_public_names(server: Server) -> str:
    """Return the whole list, sorted."""
    document = server.client.get("/openapi.json").json()
    names = {*list_settings(), *list_metrics(), *list_options(), *list_routes(document)}
    return "".join(f"{name}\n" for name in sorted(names))


def test_public_names_match_the_list(server: Server) -> None:
    assert format_public_names(server).splitlines() == LIST.read_text().splitlines()


def main(folder: Path) -> None:
    """Write the list."""
    with Server(FOVEA_MODELS=str(add_to_repository(build_model(), folder / "zoo"))) as server:
        LIST.write_text(format_public_names(server))


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        main(Path(name))
