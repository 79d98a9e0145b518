"""The page with the actions of its visitors, and the API that it is compared with."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypedDict

import httpx
import numpy as np
import numpy.typing as npt
from playwright.sync_api import Locator, Page, expect

from tests.servers import ROOT

SHIP = ROOT / "samples" / "ship.jpg"
TRUCK = ROOT / "samples" / "truck.png"

Array = npt.NDArray[np.float32]


class UploadFile(TypedDict):
    """A file as Playwright uploads it."""

    name: str
    mimeType: str
    buffer: bytes


def make_upload(name: str, content: bytes, kind: str = "") -> UploadFile:
    """Return a file that does not exist on the disk."""
    return {"name": name, "mimeType": kind, "buffer": content}


class HasClient(Protocol):
    """A service, in this process or in its own."""

    client: httpx.Client


class View:
    """An open page."""

    def __init__(self, page: Page, server: HasClient) -> None:
        self.page = page
        self.client = server.client
        self.url = str(self.client.base_url).rstrip("/")
        self.model = "cifar10"
        self._inputs: dict[tuple[str, Path], bytes] = {}
        self._layers: dict[str, list[dict[str, Any]]] = {}

    def open(self) -> None:
        """Open the page, and wait until it has loaded the list of models."""
        self.page.goto(self.url)
        expect(self.page.locator("#model")).to_be_enabled()

    def pick_files(self, *photos: Path | UploadFile) -> None:
        """Choose files, and wait for the first one's answer."""
        if all(isinstance(photo, Path) for photo in photos):
            self.page.set_input_files("#files", [str(photo) for photo in photos])
        else:
            files: Sequence[Any] = [
                photo if isinstance(photo, dict) else make_upload(photo.name, photo.read_bytes())
                for photo in photos
            ]
            self.page.set_input_files("#files", files)

    def select_model(self, model: str) -> None:
        """Choose another model."""
        self.model = model
        self.page.select_option("#model", label=model)

    @property
    def top_label(self) -> Locator:
        """The element of the most probable label."""
        return self.page.locator(".verdict")

    def photo_item(self, name: str) -> Locator:
        """Return the element of a photo in the gallery."""
        return self.page.locator(f'#gallery li[data-photo="{name}"]')

    # --- layers ---

    def column(self, tensor: str) -> Locator:
        """Scroll to the column of a layer, and return it with its values."""
        column = self.page.locator(f'.column[data-tensor="{tensor}"]')
        column.scroll_into_view_if_needed()
        expect(column.locator(".strip")).to_be_attached()
        return column

    def inspect_map(self, tensor: str, row: int = 0) -> Locator:
        """Click a layer's map, and return the detail once it is computed."""
        self.column(tensor).locator(".map").nth(row).click()
        return self.detail

    @property
    def detail(self) -> Locator:
        """The element of the displayed arithmetic, once it is computed."""
        expect(self.page.locator("#detail .arithmetic")).to_have_attribute("aria-busy", "false")
        return self.page.locator("#detail")

    def find_layer(self, tensor: str) -> dict[str, Any]:
        """Return the service's description of a layer."""
        return next(layer for layer in self.fetch_layers() if layer["tensor"] == tensor)

    def fetch_layers(self) -> list[dict[str, Any]]:
        """Return the service's descriptions of all layers."""
        if self.model not in self._layers:
            self._layers[self.model] = self.client.get(f"/v1/models/{self.model}/layers").json()["layers"]
        return self._layers[self.model]

    def tensor_name(self, kind: str, number: int = 0) -> str:
        """Return the name of the tensor that the n-th layer of a kind makes."""
        return str([layer for layer in self.fetch_layers() if layer["kind"] == kind][number]["tensor"])

    def fetch_maps(self, tensor: str, photo: Path = SHIP) -> Array:
        """Return all values of a tensor according to the API."""
        png = self._fetch_input_png(photo)
        query: dict[str, str | int] = {"tensor": tensor, "count": 0, "prepared": "true"}
        reply = self.client.post(f"/v1/models/{self.model}/maps", content=png, params=query)
        assert reply.status_code == 200, reply.text
        array: Array = np.load(BytesIO(reply.content))
        return array

    def fetch_weights(self, tensor: str, output: int) -> Array:
        """Return the weights of one output of a layer according to the API."""
        query: dict[str, str | int] = {"tensor": tensor, "first": output, "count": 1}
        reply = self.client.get(f"/v1/models/{self.model}/weights", params=query)
        assert reply.status_code == 200, reply.text
        weights: Array = np.load(BytesIO(reply.content))[0]
        return weights

    def _fetch_input_png(self, photo: Path) -> bytes:
        """Return the exact input as PNG."""
        key = self.model, photo
        if key not in self._inputs:
            path = f"/v1/models/{self.model}/explain"
            reply = self.client.post(path, content=photo.read_bytes(), params={"samples": 1})
            self._inputs[key] = base64.b64decode(reply.json()["what_the_model_saw"]["png"])
        return self._inputs[key]


def read_number(element: Locator, name: str = "value") -> float:
    """Return the number that an element carries with all its digits."""
    text = element.get_attribute(f"data-{name}")
    assert text is not None
    return float(text)


def read_numbers(elements: Locator) -> list[float]:
    """Return the numbers that these elements carry."""
    return [read_number(element) for element in elements.all()]
