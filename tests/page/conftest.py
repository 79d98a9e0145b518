"""A real browser, a real server with four models, and a page that must not complain."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.export.imports import ZOO, bring
from tests.graphs import build, publish
from tests.page.browsers import chromium
from tests.page.networks import LABELS, deep, varied
from tests.page.views import View
from tests.servers import ROOT, Server

PATIENCE = 20_000
"""Milliseconds."""
HERE = ("http://127.0.0.1:", "blob:", "data:")
TELL_VIOLATIONS = """addEventListener("securitypolicyviolation",
  (event) => console.error("policy:", event.violatedDirective, event.blockedURI))"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cifar10`, the default; `small`, of seven nodes; `deep`; `varied`, without a class activation map."""
    root = publish(build(), tmp_path_factory.mktemp("models"))
    shutil.copytree(ROOT / ZOO / "cifar10", root / "cifar10")
    (root / "default").write_text("cifar10\n")
    for name, network in (("varied", varied()), ("deep", deep())):
        imported = bring(network, tmp_path_factory.mktemp(name), LABELS).path.parents[1]
        imported.rename(root / name)
    return root


@pytest.fixture(scope="session")
def running(models: Path) -> Iterator[Server]:
    """The service of these models."""
    with Server(FOVEA_MODELS=str(models)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, one for each module; with time enough on a busy machine."""
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What the pages of a module share: files that were loaded once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.add_init_script(TELL_VIOLATIONS)
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page of its own, not yet opened. It must load nothing from elsewhere and have no faults."""
    page = context.new_page()
    faults: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: elsewhere.append(request.url))
    yield page
    page.evaluate("localStorage.clear()")
    page.close()
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
    assert [url for url in elsewhere if not url.startswith(HERE)] == []


@pytest.fixture
def view(page: Page, running: Server) -> View:
    """The page, opened."""
    view = View(page, running)
    view.open()
    return view
