"""The list of all public names, so that a changed name shows in a diff.

`python -m tests.test_public_names` writes the list again. A changed or removed name needs a line under
"Changed" in the CHANGELOG, and an error or an alias that names the new one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from typer.main import get_command

import fovea
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


def list_python_names() -> Iterator[str]:
    """Yield the names of the Python API, with the members of classes and the parameters of functions.

    Callers construct only the clients and `BatchClassifier`; `fovea.load` and `classify` make the others.
    """
    for name in fovea.__all__:
        value = getattr(fovea, name)
        yield f"python fovea.{name}"
        if inspect.isfunction(value) or name.endswith(("Client", "BatchClassifier")):
            yield from _list_parameters(name, value)
        if isinstance(value, type):
            kinds = [kind for kind in value.__mro__ if kind.__module__.startswith("fovea.")]
            for member in {one for kind in kinds for one in vars(kind) if not one.startswith("_")}:
                yield f"python fovea.{name}.{member}"
                if inspect.isfunction(getattr(value, member)):
                    yield from _list_parameters(f"{name}.{member}", getattr(value, member))


def _list_parameters(name: str, function: Any) -> Iterator[str]:
    parameters = inspect.signature(function).parameters
    yield from (f"python fovea.{name} {one}" for one in parameters if one != "self")


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
    names = {
        *list_settings(),
        *list_metrics(),
        *list_options(),
        *list_python_names(),
        *list_routes(document),
    }
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
