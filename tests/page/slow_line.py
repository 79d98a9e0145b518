"""The page on a slow line: `make page-speed`.

Chromium's network emulation gives the page 400 kbit/s and 300 ms of latency. The figures are times from
the start of a visit, and the bytes that the visit transferred. The second visit has the cache of the first.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

from playwright.sync_api import Browser, BrowserContext, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.page.browsers import launch_chromium
from tests.servers import ROOT, Server

KILOBITS: Final = 400
"""Speed of the line in kbit/s, in both directions."""

LATENCY: Final = 300
"""Time in ms from a request to the first byte of its answer."""

_TIMEOUT: Final = 120_000
"""Time limit of each wait for the page, in ms."""

_ANSWER_TIMEOUT: Final = 30_000
"""Time limit of the wait for an answer, in ms. A click that was lost has none."""

_IDLE_SECONDS: Final = 1.5
"""Time in seconds without a transfer after which a visit is over."""


class SlowVisit:
    """A visit of the page on a slow line, in a new tab."""

    def __init__(self, context: BrowserContext, *, kilobits: int = KILOBITS, latency: int = LATENCY) -> None:
        """Open a tab whose line has this speed in kbit/s and this latency in ms."""
        self.page: Page = context.new_page()
        self.page.set_default_timeout(_TIMEOUT)
        self.sizes: dict[str, int] = {}
        """Bytes of the answers so far, as they were transferred and not read from the cache, by URL."""
        self.early_bytes = 0
        """Bytes that had been transferred when the page worked."""
        self._request_urls: dict[str, str] = {}
        self._last_transfer = time.monotonic()
        session = context.new_cdp_session(self.page)
        session.send("Network.enable")
        bytes_per_second = kilobits * 1000 / 8
        session.send(
            "Network.emulateNetworkConditions",
            {
                "offline": False,
                "latency": latency,
                "downloadThroughput": bytes_per_second,
                "uploadThroughput": bytes_per_second,
            },
        )
        session.on("Network.requestWillBeSent", self._note_request)
        session.on("Network.loadingFinished", self._count_answer)
        session.on("Network.dataReceived", self._note_transfer)

    @property
    def bytes(self) -> int:
        """Bytes of all answers so far."""
        return sum(self.sizes.values())

    def open(self, server: Server) -> float:
        """Open the page, and return the seconds until it works: it knows the models and takes photos."""
        started = time.monotonic()
        self.page.goto(server.url, wait_until="commit")
        expect(self.page.locator("#model")).to_be_enabled(timeout=_TIMEOUT)
        seconds, self.early_bytes = time.monotonic() - started, self.bytes
        return seconds

    def _note_request(self, event: dict[str, Any]) -> None:
        self._request_urls[event["requestId"]] = event["request"]["url"]
        self._note_transfer(event)

    def _count_answer(self, event: dict[str, Any]) -> None:
        if size := int(event["encodedDataLength"]):
            url = self._request_urls[event["requestId"]]
            self.sizes[url] = self.sizes.get(url, 0) + size
        self._note_transfer(event)

    def _note_transfer(self, _event: dict[str, Any]) -> None:
        self._last_transfer = time.monotonic()

    def wait_until_idle(self) -> None:
        """Wait until nothing has been transferred for a while."""
        while time.monotonic() < self._last_transfer + _IDLE_SECONDS:
            self.page.wait_for_timeout(100)


def main() -> None:
    """Print the table of the first and the second visit."""
    parser = argparse.ArgumentParser(prog="python -m tests.page.slow_line", description=__doc__)
    parser.add_argument("--models", default=str(ROOT / "zoo"), help="folder of models (default: zoo)")
    models = parser.parse_args().models
    print("| visit | works after s | transferred until then, kB | in all, kB | answers |")
    print("|---|---|---|---|---|")
    with Server(FOVEA_MODELS=models) as server, launch_chromium() as browser:
        context = browser.new_context()
        for visit in ("first", "second"):
            print(f"| {visit} | {' | '.join(measure_visit(context, server))} |", flush=True)
        print()
        print(
            f"An answer for a sample that was clicked at the first moment: {measure_answer(browser, server)}."
        )
        for model in server.client.get("/v1/models").json()["models"]:
            path = f"/v1/models/{model['name']}/versions/{model['version']}/contract"
            contract = server.client.get(path)
            transferred = contract.num_bytes_downloaded / 1000
            print(
                f"Contract of {model['name']}: {len(contract.content) / 1000:.1f} kB, "
                f"transferred as {transferred:.1f} kB."
            )


def measure_visit(context: BrowserContext, server: Server) -> list[str]:
    """Open the page, and return the cells of the table."""
    visit = SlowVisit(context)
    seconds = visit.open(server)
    visit.wait_until_idle()
    visit.page.close()
    return [
        f"{seconds:.1f}",
        f"{visit.early_bytes / 1000:.0f}",
        f"{visit.bytes / 1000:.0f}",
        str(len(visit.sizes)),
    ]


def measure_answer(browser: Browser, server: Server) -> str:
    """Click a sample as soon as there is one, and return the time from the start to the answer."""
    visit = SlowVisit(browser.new_context())
    started = time.monotonic()
    visit.page.goto(server.url, wait_until="commit")
    visit.page.locator(".samples button").nth(1).click()
    try:
        visit.page.locator(".verdict").wait_for(timeout=_ANSWER_TIMEOUT)
    except PlaywrightTimeout:
        return "none, the click was lost"
    return f"after {time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    main()
