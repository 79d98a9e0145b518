"""A real browser, a real server with eight models, and a page that must log no error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.export.imports import ZOO, import_graph
from tests.graphs import add_to_repository, build_model, build_unopenable
from tests.page.browsers import launch_chromium
from tests.page.networks import LABELS, build_deep_network, build_unnamed_network, build_varied_network
from tests.page.views import View
from tests.servers import FLOAT_MODEL, ROOT, Server
from tests.tools import require_tool

TIMEOUT_MS = 20_000
"""Time limit of each wait for the page, in milliseconds."""
LOCAL_URLS = ("http://127.0.0.1:", "blob:", "data:")
REPORT_VIOLATIONS = """addEventListener("securitypolicyviolation",
  (event) => console.error("policy:", event.violatedDirective, event.blockedURI))"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of eight models.

    `cifar10` is the default, in int8, and `float` is the same in float32. `small` has seven nodes, `deep` has
    many layers, `unnamed` has many layers without names, `varied` has no class activation map, `closed` has
    no maps of layers, and `tiny_vgg` is the model for teaching.
    """
    require_tool("chromium")  # before anything slow
    root = add_to_repository(build_model(), tmp_path_factory.mktemp("models"))
    add_to_repository(build_unopenable(), root, "closed")
    for name in ("cifar10", "tiny_vgg"):
        shutil.copytree(ROOT / ZOO / name, root / name)
    shutil.copytree(FLOAT_MODEL.parent, root / "float" / "1")
    (root / "default").write_text("cifar10\n")
    networks = {
        "varied": build_varied_network(),
        "deep": build_deep_network(),
        "unnamed": build_unnamed_network(),
    }
    for name, network in networks.items():
        model_folder = import_graph(network, tmp_path_factory.mktemp(name), LABELS).path.parents[1]
        model_folder.rename(root / name)
    return root


@pytest.fixture(scope="session")
def page_server(models: Path) -> Iterator[Server]:
    """A service of these models with a short time limit for occlusions."""
    with Server(FOVEA_MODELS=str(models), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, one for each module, with time limits for a busy machine."""
    expect.set_options(timeout=TIMEOUT_MS)
    with launch_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Page:
    """A tab for each module, which keeps loaded files in its cache."""
    tab = browser.new_page()
    tab.add_init_script(REPORT_VIOLATIONS)
    tab.set_default_timeout(TIMEOUT_MS)
    return tab


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The tab, empty and with reduced motion.

    The page must load nothing from other hosts, and log no error.
    """
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light", reduced_motion="reduce", forced_colors="none")
    faults: list[str] = []
    request_urls: list[str] = []
    listeners: tuple[tuple[Any, Callable[[Any], None]], ...] = (
        ("pageerror", lambda error: faults.append(str(error))),
        ("console", lambda message: faults.append(message.text) if message.type == "error" else None),
        ("request", lambda request: request_urls.append(request.url)),
    )
    for event, listener in listeners:
        tab.on(event, listener)
    yield tab
    tab.evaluate("localStorage.clear()")
    tab.unroute_all()
    tab.goto("about:blank")
    for event, listener in listeners:
        tab.remove_listener(event, listener)
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
    assert [url for url in request_urls if not url.startswith((*LOCAL_URLS, "about:"))] == []


@pytest.fixture
def view(page: Page, page_server: Server) -> View:
    """The opened page."""
    view = View(page, page_server)
    view.open()
    return view
