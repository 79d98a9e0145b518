"""Heat maps that explain the answer to one image.

The maps are computed with plain ONNX Runtime, without gradients. The code runs in a process of its own
(`service.explain.process`), and in the command `fovea explain`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from PIL import Image

from fovea.service.artifact.contract import Contract, Task
from fovea.service.artifact.onnx_edit import add_outputs
from fovea.service.errors import BadRequest, Internal, one_line
from fovea.service.explain.cam import Cam, Head, head_of, proven
from fovea.service.explain.heatmap import (
    LONGEST_SIDE,
    Centres,
    Heat,
    Place,
    evenly,
    grid_of,
    middles,
    overlay,
)
from fovea.service.explain.layers import field_of
from fovea.service.explain.occlusion import Step, occlude
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Floats, open_session, run_outputs
from fovea.service.inference.preprocess import DecodeTrace, Pixels, decode_image, decode_upright
from fovea.service.runners.messages import ProcessPlan

Method: TypeAlias = Literal["auto", "cam", "occlusion"]

_BATCH: Final = 16
"""Number of masked images in one model call, which is also the step of a progress bar."""

_GRID: Final = 96
"""Longest side of a heat map that is returned as numbers."""


@dataclass(frozen=True)
class Question:
    """A question: the label to explain, and the method."""

    method: Method = "auto"
    label: int | None = None
    """Index of the label in the contract; None means the most probable label."""
    seed: int = 0
    samples: int = 0
    """Number of masked images of an occlusion; 0 means as many as the time allows."""
    seconds: float = 4.0
    """Time limit of an occlusion in seconds, if `samples` is 0."""
    picture: bool = False
    """True for a PNG of the photo under its heat map instead of numbers."""


@dataclass(frozen=True)
class Seen:
    """The model's input, and the answer to it."""

    format: str
    place: Place
    png: bytes
    """Exact input of the model as a PNG."""
    steps: list[tuple[str, str]]
    """Steps of the preprocessing, as in `preprocess.Receipt`."""
    probabilities: Floats
    """Probabilities, float32 (labels,)."""
    warnings: Sequence[ImageWarning] = ()
    """Warnings about the preprocessing."""


@dataclass(frozen=True)
class Explanation:
    """An explanation of one label of an image."""

    label: int
    method: Literal["cam", "occlusion"]
    note: str | None
    """Reason why there is no class activation map, or None."""
    samples: int
    """Number of masked images that were classified."""
    heat: Floats
    """Heat map over the photo, float32 (height, width), 0 … 1."""
    picture: bytes
    """PNG, empty unless it was requested."""


class Explainer:
    """An explainer of one model. Only one thread at a time may use it."""

    def __init__(self, model: bytes, contract: Contract, plan: ProcessPlan) -> None:
        """Load the model from the content of its file.

        Raises `ModelError` if the model cannot be loaded at all.
        """
        self.contract = contract
        self._image_pixels = plan.image_pixels
        self._memory = DecodeMemory(plan.decode_bytes)
        self._cam: Cam | str
        try:
            head = head_of(contract)
            names = [head.maps, *([head.weight] if head.weight else [])]
            self._session = open_session(add_outputs(model, names), plan.provider, plan.max_threads)
            self._cam = proven(head, contract, self._run)
            self._centres = self._centres_of(head)
        except Exception as error:
            # Whatever the error is, an occlusion is still possible: it needs no knowledge about the network.
            self._cam = one_line(error)
            self._session = open_session(model, plan.provider, plan.max_threads)

    def see(self, image: bytes) -> tuple[Pixels, Seen]:
        """Decode an image and classify it.

        Raises the errors of `preprocess.decode`.
        """
        receipt = DecodeTrace()
        decoded = decode_image(
            image,
            self.contract.input,
            max_pixels=self._image_pixels,
            memory=self._memory,
            trace=receipt,
        )
        pixels = decoded.pixels
        probabilities = self._run([self.contract.probabilities_name], pixels[None])[0][0]
        if not np.isfinite(probabilities).all():
            raise Internal("the model's answer to this image is not finite (NaN or infinite)")
        place = Place((decoded.width, decoded.height), receipt.crop_box, pixels.shape[:2])
        seen = Seen(
            decoded.format, place, _png(pixels), receipt.steps, probabilities, warnings=decoded.warnings
        )
        return pixels, seen

    def explain(
        self,
        image: bytes,
        question: Question,
        began: Callable[[Seen], None],
        told: Callable[[Step, Callable[[], Floats]], None],
    ) -> Explanation:
        """Explain one image.

        `began` is called first, with the model's input. During an occlusion `told` is called after each step,
        with a function that returns the current map over the photo. Both run in the calling thread; `told`
        may raise an exception to stop the occlusion.

        Raises the errors of `preprocess.decode`, and `BadRequest` if the network does not allow the method.
        """
        if question.method == "cam":
            self._require_cam()
        pixels, seen = self.see(image)
        if question.picture and max(seen.place.size) > LONGEST_SIDE:
            raise BadRequest(f"a side of more than {LONGEST_SIDE} pixels is not painted; ask for format=json")
        began(seen)
        label = int(seen.probabilities.argmax()) if question.label is None else question.label
        grid = grid_of(seen.place.size, _GRID)
        samples = 0
        note = None
        if isinstance(self._cam, str) or question.method == "occlusion":
            for step in self._occlude(pixels, label, question):
                heat = self._evenly(step.heat)
                samples = step.samples
                told(step, partial(heat.over, seen.place, grid))
            note = self._cam if isinstance(self._cam, str) else None
        else:
            heat = Heat(self.class_map(pixels, label), *self._centres)
        if not np.isfinite(heat.values).all():
            raise Internal("the model's maps of this image are not finite (NaN or infinite)")
        picture = b""
        if question.picture:
            photo = decode_upright(image, max_pixels=self._image_pixels, memory=self._memory)
            picture = overlay(photo, heat, seen.place)
        method: Literal["cam", "occlusion"] = "occlusion" if samples else "cam"
        return Explanation(label, method, note, samples, heat.over(seen.place, grid), picture)

    @property
    def has_cam(self) -> bool:
        """True if the network has class activation maps."""
        return not isinstance(self._cam, str)

    def class_map(self, pixels: Pixels, label: int) -> Floats:
        """Return the evidence for a label at each place of the last feature maps, float32 (h, w).

        Raises `BadRequest` if the network has no class activation maps.
        """
        cam = self._require_cam()
        return cam.map(self._run([cam.head.maps], pixels[None])[0], label)

    def _require_cam(self) -> Cam:
        if isinstance(self._cam, str):
            raise BadRequest(f"there is no class activation map: {self._cam}; ask for method=occlusion")
        return self._cam

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

    def _centres_of(self, head: Head) -> tuple[Centres, Centres]:
        """Return the positions of the last feature maps' places on the input.

        The position is the centre of the receptive field if it is known; otherwise the places are spread
        evenly.
        """
        seen, geometry = field_of(self.contract, head.maps), self.contract.input
        _, height, width = head.arrangement.shape
        if seen is None:
            return evenly(height, geometry.height), evenly(width, geometry.width)
        return middles(seen.rows, height), middles(seen.columns, width)

    def _evenly(self, values: Floats) -> Heat:
        geometry = self.contract.input
        return Heat(values, evenly(len(values), geometry.height), evenly(values.shape[1], geometry.width))

    def _run(self, names: list[str], batch: Pixels) -> list[Floats]:
        return [np.asarray(values, np.float32) for values in run_outputs(self._session, names, batch)]


def _png(pixels: Pixels) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()
