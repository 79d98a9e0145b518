"""Every setting, metric, error and route is in its page of docs/, and no other; no link is broken."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.errors import RequestError
from fovea.service.observability.metrics import Metrics
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.documents import DOCS, list_pages, read_page
from tests.servers import ROOT, Server

SETTINGS = read_page("settings")

FOREIGN_CLASSES = {"BeforeValidator", "MobileNetV2ImageProcessor", "NoDecode"}
"""Names of other projects that pages quote."""

FOLDERS = ("service", "model", "export", "bench", "tests", "fovea")


def test_every_setting_is_documented_and_no_other() -> None:
    real = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(rf"`({ENVIRONMENT_PREFIX}[A-Z_]+)`", SETTINGS)) == real
    assert set(re.findall(rf"^\| `({ENVIRONMENT_PREFIX}[A-Z_]+)` \|", SETTINGS, re.MULTILINE)) == real
    for path in list_pages():
        assert set(re.findall(rf"{ENVIRONMENT_PREFIX}[A-Z_]+", path.read_text())) <= real, path


def test_defaults_in_the_table_are_the_real_ones() -> None:
    rows = dict(re.findall(rf"^\| `{ENVIRONMENT_PREFIX}([A-Z_]+)` \|([^|]*)\|", SETTINGS, re.MULTILINE))
    for name, field in Settings.model_fields.items():
        default = rows[name.upper()].strip().strip("`").replace(" ", "")
        assert default == _format_value(field.default), name


def _format_value(value: object) -> str:
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
    assert set(re.findall(r"^\| `(fovea_[a-z_]+)`", read_page("metrics"), re.MULTILINE)) == real


def test_every_error_code_is_documented_with_its_status() -> None:
    errors = read_page("errors")
    for error in _leaf_errors(RequestError):
        assert re.search(rf"^\| {error.status} \|.*`{error.code}`", errors, re.MULTILINE), error.code


def _leaf_errors(error: type[RequestError]) -> Iterator[type[RequestError]]:
    for subclass in error.__subclasses__():
        if hasattr(subclass, "code"):
            yield subclass
        yield from _leaf_errors(subclass)


def test_every_route_is_documented(server: Server) -> None:
    api = read_page("http-api")
    for path in server.client.get("/openapi.json").json()["paths"]:
        plain = path.replace("/versions/{version}", "").replace("/{version}", "")
        assert f"{plain}`" in api, path


LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", list_pages(), ids=lambda path: path.stem)
def test_every_link_within_the_documentation_leads_somewhere(path: Path) -> None:
    for link in LINK.findall(CODE.sub("", path.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in _heading_anchors(target.read_text()), link


def _heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and MyST give to the headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_contents_of_the_site() -> None:
    blocks = re.findall(r"^```{toctree}\n(.*?)^```", read_page("index"), re.MULTILINE | re.DOTALL)
    entries = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    for path in DOCS.glob("*.md"):
        assert path.stem == "index" or any(path.match(f"{entry}.md") for entry in entries), path


def test_every_file_and_class_that_a_page_names_exists() -> None:
    """Walks through the code must not lead to files that have moved, nor to names of yesterday."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in FOLDERS]
    names = {
        name for path in files for name in re.findall(r"^\s*class (\w+)", path.read_text(), re.MULTILINE)
    }
    missing = []
    for page in [*list_pages(), ROOT / "CONTRIBUTING.md"]:
        for quoted in re.findall(r"`([^`\n]+)`", page.read_text()):
            if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.\w+", quoted):
                is_known = (ROOT / quoted).exists()
            elif re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}", quoted):  # a class, or an alert
                is_known = quoted in names | FOREIGN_CLASSES or quoted.startswith("Fovea")
            else:
                continue
            if not is_known:
                missing.append(f"{page.relative_to(ROOT)}: {quoted}")
    assert missing == []


def test_every_diagram_is_drawn() -> None:
    """The site shows files that `make diagrams` draws; a file is named by the digest of its text."""
    program = runpy.run_path(str(DOCS / "draw_diagrams.py"))
    drawn = {program["diagram_file"](text) for text in program["list_diagrams"]()}
    assert drawn == {path.name for path in (DOCS / "diagrams").glob("*.svg")}
    assert len(drawn) >= 3
