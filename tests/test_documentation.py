"""The pages of docs/ list exactly the settings, metrics, errors and routes, and have no broken link."""

from __future__ import annotations

import builtins
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from fovea.service.errors import RequestError
from fovea.service.observability.metrics import Metrics
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.documents import DOCS, list_pages, read_page
from tests.servers import ROOT, Server

SETTINGS = read_page("settings")

FOREIGN_CLASSES = (
    {"BeforeValidator", "NoDecode"}
    | {f"{name}ImageProcessor" for name in ("ConvNext", "Levit", "MobileNetV2")}
    | {"AverageValue", "ClusterServingRuntime", "IfNotPresent", "ImageVolume", "InferenceService"}
    | {"LoadBalancer", "NodePort", "RawDeployment", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce"}
)
"""Names of other projects that pages quote."""

FOLDERS = ("service", "model", "export", "bench", "tests", "fovea")


def test_settings_page_lists_exactly_the_settings() -> None:
    names = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(rf"`({ENVIRONMENT_PREFIX}[A-Z_]+)`", SETTINGS)) == names
    assert set(re.findall(rf"^\| `({ENVIRONMENT_PREFIX}[A-Z_]+)` \|", SETTINGS, re.MULTILINE)) == names
    for path in list_pages():
        named = set(re.findall(rf"{ENVIRONMENT_PREFIX}[A-Z_]+", path.read_text()))
        assert named - {"FOVEA_KEY"} <= names, path  # which is a variable of clients


def test_settings_page_shows_the_real_defaults() -> None:
    rows = dict(re.findall(rf"^\| `{ENVIRONMENT_PREFIX}([A-Z_]+)` \|([^|]*)\|", SETTINGS, re.MULTILINE))
    for name, field in Settings.model_fields.items():
        default = rows[name.upper()].strip().strip("`").replace(" ", "")
        assert default == _format_value(field.default), name


def _format_value(value: object) -> str:
    """Format a default as an environment variable."""
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_metrics_page_lists_exactly_the_metrics() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    suffix = {"counter": "_total"}
    names = {metric.name + suffix.get(metric.type, "") for metric in registry.collect()}
    assert set(re.findall(r"^\| `(fovea_[a-z_]+)`", read_page("metrics"), re.MULTILINE)) == names


def test_errors_page_lists_every_code_with_its_status() -> None:
    page = read_page("errors")
    for error in _leaf_errors(RequestError):
        assert re.search(rf"^\| {error.status} \|.*`{error.code}`", page, re.MULTILINE), error.code


def _leaf_errors(error: type[RequestError]) -> Iterator[type[RequestError]]:
    for subclass in error.__subclasses__():
        if hasattr(subclass, "code"):
            yield subclass
        yield from _leaf_errors(subclass)


def test_http_api_page_lists_every_route(server: Server) -> None:
    page = read_page("http-api")
    for path in server.client.get("/openapi.json").json()["paths"]:
        documented_path = path.replace("/versions/{version}", "").replace("/{version}", "")
        assert f"{documented_path}`" in page, path


LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", list_pages(), ids=lambda path: path.stem)
def test_links_between_pages_have_existing_targets(path: Path) -> None:
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


def test_site_contents_list_every_page() -> None:
    blocks = re.findall(r"^```{toctree}\n(.*?)^```", read_page("index"), re.MULTILINE | re.DOTALL)
    entries = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    for path in DOCS.glob("*.md"):
        assert path.stem == "index" or any(path.match(f"{entry}.md") for entry in entries), path


def test_files_classes_and_tests_named_in_pages_exist() -> None:
    """Pages must not name what was moved or renamed."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in FOLDERS]
    class_names = {
        name for path in files for name in re.findall(r"^\s*class (\w+)", path.read_text(), re.MULTILINE)
    } | set(re.findall(r"^  rpc (\w+)", (ROOT / "service/grpc/inference.proto").read_text(), re.MULTILINE))
    test_names = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    missing = []
    for page in [*list_pages(), ROOT / "CONTRIBUTING.md"]:
        for quote in re.findall(r"`([^`\n]+)`", page.read_text()):
            if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.\w+", quote):
                is_known = (ROOT / quote).exists()
            elif re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}", quote):  # a class, or an alert
                is_known = (
                    quote in class_names | FOREIGN_CLASSES
                    or quote.startswith("Fovea")
                    or hasattr(builtins, quote)
                )
            elif re.fullmatch(r"test_\w+", quote):
                is_known = quote in test_names
            else:
                continue
            if not is_known:
                missing.append(f"{page.relative_to(ROOT)}: {quote}")
    assert missing == []


def test_every_diagram_has_a_file_and_no_other() -> None:
    """The site shows files that `make diagrams` draws; the name of a file is the digest of its text."""
    program = runpy.run_path(str(DOCS / "draw_diagrams.py"))
    expected_files = {program["diagram_file"](text) for text in program["list_diagrams"]()}
    assert expected_files == {path.name for path in (DOCS / "diagrams").glob("*.svg")}
    assert len(expected_files) >= 3


def test_moving_picture_is_short_and_small() -> None:
    path = ROOT / "docs" / "page.webp"
    assert f'src="docs/{path.name}"' in (ROOT / "README.md").read_text()
    assert path.stat().st_size <= 1_500_000
    milliseconds = 0
    with Image.open(path) as picture:
        for number in range(picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(number)
            picture.load()
            milliseconds += picture.info["duration"]
    assert 15_000 <= milliseconds <= 25_000
