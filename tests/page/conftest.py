"""A real browser, a real server with five models, and a page that must not complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.export.imports import ZOO, bring
from tests.graphs import build, closed, publish
from tests.page.browsers import chromium
from tests.page.networks import LABELS, deep, varied
from tests.page.views import View
from tests.servers import ROOT, Server
from tests.tools import need

PATIENCE = 20_000
"""Milliseconds."""
HERE = ("http://127.0.0.1:", "blob:", "data:")
TELL_VIOLATIONS = """addEventListener("securitypolicyviolation",
  (event) => console.error("policy:", event.violatedDirective, event.blockedURI))"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cifar10`, the default; `small`, of seven nodes; `deep`; `varied`, without a class activation map;
    `closed`, without maps."""
    need("chromium")  # before anything slow
    root = publish(build(), tmp_path_factory.mktemp("models"))
    publish(closed(), root, "closed")
    shutil.copytree(ROOT / ZOO / "cifar10", root / "cifar10")
    (root / "default").write_text("cifar10\n")
    for name, network in (("varied", varied()), ("deep", deep())):
        imported = bring(network, tmp_path_factory.mktemp(name), LABELS).path.parents[1]
        imported.rename(root / name)
    return root


@pytest.fixture(scope="session")
def running(models: Path) -> Iterator[Server]:
    """The service of these models; it does not take long over an occlusion."""
    with Server(FOVEA_MODELS=str(models), FOVEA_EXPLAIN_SECONDS="0.3") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, one for each module; with time enough on a busy machine."""
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Page:
    """One for each module: what was loaded once is known."""
    tab = browser.new_page()
    tab.add_init_script(TELL_VIOLATIONS)
    tab.set_default_timeout(PATIENCE)
    return tab


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The tab, empty and as a visitor has it who wants little to move. It must load nothing from elsewhere
    and have no faults."""
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light", reduced_motion="reduce", forced_colors="none")
    faults: list[str] = []
    asked: list[str] = []
    heard: tuple[tuple[Any, Callable[[Any], None]], ...] = (
        ("pageerror", lambda error: faults.append(str(error))),
        ("console", lambda message: faults.append(message.text) if message.type == "error" else None),
        ("request", lambda request: asked.append(request.url)),
    )
    for event, hear in heard:
        tab.on(event, hear)
    yield tab
    tab.evaluate("localStorage.clear()")
    tab.unroute_all()
    tab.goto("about:blank")
    for event, hear in heard:
        tab.remove_listener(event, hear)
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
    assert [url for url in asked if not url.startswith((*HERE, "about:"))] == []


@pytest.fixture
def view(page: Page, running: Server) -> View:
    """The page, opened."""
    view = View(page, running)
    view.open()
    return view
