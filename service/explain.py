"""Why a model says what it says: heat maps of one image, and what its layers make of it.

From plain ONNX Runtime, without gradients. It runs in a process of its own (`service.explainer`), and in
`fovea explain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from PIL import Image

from service.cam import Cam, NoCam, head_of
from service.contract import Contract, Geometry, Interpolation, PixelPath, Resize, Task
from service.engine import Floats, golden_pixels, open_session
from service.errors import BadRequest, ModelError, NotFound, one_line
from service.graph import with_outputs
from service.heat import Centres, Heat, Place, evenly, grid_of, middles, overlay
from service.images import Decoded, Pixels, Receipt, decode, upright
from service.messages import Plan
from service.network import Shown, describe
from service.occlusion import Step, occlude
from service.opened import Opened

Method: TypeAlias = Literal["auto", "cam", "occlusion"]

_BATCH: Final = 16
"""Masked images in one call: what a progress bar moves by."""

_GRID: Final = 96
"""Longest side of a heat map that is given as numbers."""


@dataclass(frozen=True)
class Question:
    """What is to be explained, and how."""

    method: Method = "auto"
    label: int | None = None
    """Its place in the contract; None for the most probable."""
    seed: int = 0
    samples: int = 0
    """Masked images of an occlusion; 0 for as many as there is time for."""
    seconds: float = 4.0
    """How much time that is."""
    picture: bool = False
    """As a PNG of the photo under its heat, and not as numbers."""


@dataclass(frozen=True)
class Seen:
    """What the model saw."""

    format: str
    place: Place
    png: bytes
    """The exact input."""
    steps: list[tuple[str, str]]
    """How it came about, as `images.Receipt` has it."""
    probabilities: Floats
    """float32 (labels,)."""


@dataclass(frozen=True)
class Explanation:
    """Why an image has a label."""

    label: int
    method: Literal["cam", "occlusion"]
    note: str | None
    """Why there is no class activation map, where there is none."""
    samples: int
    """Masked images that were classified."""
    heat: Floats
    """Over the photo, float32 (height, width), 0 … 1."""
    picture: bytes
    """The PNG, where it was asked for."""


class Explainer:
    """One model, to be explained. To be used by one thread at a time."""

    def __init__(self, model: bytes, contract: Contract, plan: Plan) -> None:
        """`model` is the file's content. Raises `ModelError` when it cannot be loaded at all."""
        self.contract = contract
        self._model = model
        self._threads = max(plan.threads, plan.wide_threads)
        self._image_pixels = plan.image_pixels
        self._opened: Opened | str | None = None
        self._cam: Cam | str
        self._maps = ""
        try:
            head = head_of(contract)
            names = [head.maps, *([head.weight] if head.weight else [])]
            self._session = open_session(with_outputs(model, names), plan.provider, self._threads)
            self._maps = head.maps
            golden = [golden_pixels(one) for one in contract.golden.images[:2]]
            self._cam = self._proven(head, golden)
        except (NoCam, ModelError) as error:
            self._cam = one_line(error)
            self._session = open_session(model, plan.provider, self._threads)
        if not isinstance(self._cam, str):
            self._centres = self._centres_of(self._maps)

    # --- heat maps ---

    def see(self, image: bytes) -> tuple[Pixels, Seen]:
        """Decode an image and classify it. Raises what `images.decode` does."""
        receipt = Receipt()
        decoded = decode(image, self.contract.input, max_pixels=self._image_pixels, receipt=receipt)
        pixels = decoded.pixels
        probabilities = self._run([self.contract.probabilities_name], pixels[None])[0][0]
        place = Place((decoded.width, decoded.height), receipt.box, pixels.shape[:2])
        return pixels, Seen(decoded.format, place, _png(pixels), receipt.steps, probabilities)

    def explain(
        self,
        image: bytes,
        question: Question,
        began: Callable[[Seen], None],
        told: Callable[[Step, Floats], None],
    ) -> Explanation:
        """Explain one image. `began` is called first, and `told` while an occlusion goes on.

        Raises what `images.decode` does, and `BadRequest` for a method that this network does not allow.
        """
        if question.method == "cam" and isinstance(self._cam, str):
            raise BadRequest(f"there is no class activation map: {self._cam}; ask for method=occlusion")
        pixels, seen = self.see(image)
        began(seen)
        label = int(seen.probabilities.argmax()) if question.label is None else question.label
        grid = grid_of(seen.place.size, _GRID)
        samples = 0
        note = None
        if isinstance(self._cam, str) or question.method == "occlusion":
            for step in self._occlude(pixels, label, question):
                heat = self._evenly(step.heat)
                samples = step.samples
                told(step, heat.over(seen.place, grid))
            note = self._cam if isinstance(self._cam, str) else None
        else:
            heat = Heat(self.class_map(pixels, label), *self._centres)
        picture = b""
        if question.picture:
            photo = upright(image, max_pixels=self._image_pixels)
            picture = overlay(photo, heat.over(seen.place, (photo.height, photo.width)), seen.place.box)
        method: Literal["cam", "occlusion"] = "occlusion" if samples else "cam"
        return Explanation(label, method, note, samples, heat.over(seen.place, grid), picture)

    def class_map(self, pixels: Pixels, label: int) -> Floats:
        """How each place of the last maps speaks for a label, float32 (h, w). Raises `BadRequest`."""
        if isinstance(self._cam, str):
            raise BadRequest(f"there is no class activation map: {self._cam}; ask for method=occlusion")
        return self._cam.map(self._run([self._maps], pixels[None])[0][0], label)

    def _occlude(self, pixels: Pixels, label: int, question: Question) -> Any:
        binary = self.contract.task is Task.BINARY

        def logits(batch: Pixels) -> Floats:
            values = self._run([self.contract.logits_name], batch)[0]
            return (values[:, 0] if label else -values[:, 0]) if binary else values[:, label]

        return occlude(
            logits,
            pixels,
            seed=question.seed,
            samples=question.samples,
            seconds=question.seconds,
            batch=_BATCH,
        )

    def _proven(self, head: Any, golden: list[Pixels]) -> Cam:
        outputs = [self._maps, self.contract.logits_name]
        maps, logits = zip(*(self._run(outputs, pixels[None]) for pixels in golden), strict=True)
        weights = self._run([head.weight], golden[0][None])[0] if head.weight else None
        return Cam.proven(
            head,
            weights,
            np.concatenate(maps),
            np.concatenate(logits),
            binary=self.contract.task is Task.BINARY,
        )

    def _centres_of(self, tensor: str) -> tuple[Centres, Centres]:
        """Where the places of the last maps lie: in the middle of what they see, where that can be told."""
        layers = describe(self.contract, {}, {})
        layer = next(one for one in layers if one.tensor == tensor)
        _, height, width = (size or 0 for size in layer.shape)
        if layer.seen is None:
            geometry = self.contract.input
            return evenly(height, geometry.height), evenly(width, geometry.width)
        return middles(layer.seen.rows, height), middles(layer.seen.columns, width)

    def _evenly(self, values: Floats) -> Heat:
        geometry = self.contract.input
        return Heat(values, evenly(len(values), geometry.height), evenly(values.shape[1], geometry.width))

    def _run(self, names: list[str], batch: Pixels) -> list[Floats]:
        """One image after the other where the graph takes no more at once."""
        fed = self._session.get_inputs()[0].shape[0]
        parts = [batch] if fed != 1 else [batch[row : row + 1] for row in range(len(batch))]
        try:
            found = [self._session.run(names, {self.contract.input_name: part}) for part in parts]
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
            raise ModelError(f"the graph does not run: {one_line(error)}") from None
        return [np.asarray(np.concatenate(values), np.float32) for values in zip(*found, strict=True)]

    # --- layers ---

    @property
    def has_cam(self) -> bool:
        """There are class activation maps."""
        return not isinstance(self._cam, str)

    def layers(self) -> tuple[list[Shown], str | None]:
        """The layers, and why the graph cannot be opened, where it cannot."""
        opened = self._open()
        return (describe(self.contract, {}, {}), opened) if isinstance(opened, str) else (opened.layers, None)

    def values(self, tensor: str, image: bytes, *, prepared: bool) -> Floats:
        """What a layer makes of an image, float32. A `prepared` one is the model's input itself.

        Raises `NotFound` for no layer, and what `images.decode` does.
        """
        opened = self._require_open()
        geometry = self.contract.input
        if prepared:
            geometry = _as_it_is(geometry)
        decoded: Decoded = decode(image, geometry, max_pixels=self._image_pixels)
        size = geometry.width, geometry.height
        if prepared and (decoded.width, decoded.height) != size:
            raise BadRequest(
                f"a prepared image has {size[0]} x {size[1]} pixels, not {decoded.width} x {decoded.height}"
            )
        return opened.values(tensor, decoded.pixels)

    def weight(self, tensor: str, part: str) -> Floats:
        """See `Opened.weight`. Raises `NotFound`."""
        return self._require_open().weight(tensor, part)

    def _require_open(self) -> Opened:
        opened = self._open()
        if isinstance(opened, str):
            raise NotFound(f"the graph cannot be looked into: {opened}")
        return opened

    def _open(self) -> Opened | str:
        """On first use; or why it cannot be."""
        if self._opened is None:
            try:
                self._opened = Opened(self._model, self.contract, threads=self._threads)
            except ModelError as error:
                self._opened = one_line(error)
        return self._opened


def _as_it_is(geometry: Geometry) -> Geometry:
    return Geometry(
        geometry.height, geometry.width, Resize.STRETCH, 0, Interpolation.NEAREST, PixelPath.EXACT
    )


def _png(pixels: Pixels) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()
