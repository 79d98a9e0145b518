"""Why a model says what it says: heat maps of one image.

The maps come from plain ONNX Runtime, without gradients. This code runs in a process of its own
(`service.explain.process`), and in `fovea explain`.
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
from fovea.service.artifact.onnx_edit import with_outputs
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
from fovea.service.inference.preprocess import Pixels, Receipt, decode, upright
from fovea.service.runners.messages import Plan

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
    warnings: Sequence[ImageWarning] = ()
    """What may surprise about how it came about."""


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
        self._image_pixels = plan.image_pixels
        self._memory = DecodeMemory(plan.decode_bytes)
        self._cam: Cam | str
        try:
            head = head_of(contract)
            names = [head.maps, *([head.weight] if head.weight else [])]
            self._session = open_session(with_outputs(model, names), plan.provider, plan.most_threads)
            self._cam = proven(head, contract, self._run)
            self._centres = self._centres_of(head)
        except Exception as error:  # NoCam, or whatever is wrong: an occlusion needs to know nothing
            self._cam = one_line(error)
            self._session = open_session(model, plan.provider, plan.most_threads)

    def see(self, image: bytes) -> tuple[Pixels, Seen]:
        """Decode an image and classify it. Raises what `images.decode` does."""
        receipt = Receipt()
        decoded = decode(
            image,
            self.contract.input,
            max_pixels=self._image_pixels,
            memory=self._memory,
            receipt=receipt,
        )
        pixels = decoded.pixels
        probabilities = self._run([self.contract.probabilities_name], pixels[None])[0][0]
        if not np.isfinite(probabilities).all():
            raise Internal("the model's answer to this image is not finite (NaN or infinite)")
        place = Place((decoded.width, decoded.height), receipt.box, pixels.shape[:2])
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
        """Explain one image. `began` is called first, and `told` while an occlusion goes on, with what gives
        the map over the photo as it is then.

        Raises what `images.decode` does, and `BadRequest` for a method that this network does not allow.
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
            photo = upright(image, max_pixels=self._image_pixels, memory=self._memory)
            picture = overlay(photo, heat, seen.place)
        method: Literal["cam", "occlusion"] = "occlusion" if samples else "cam"
        return Explanation(label, method, note, samples, heat.over(seen.place, grid), picture)

    @property
    def has_cam(self) -> bool:
        """There are class activation maps."""
        return not isinstance(self._cam, str)

    def class_map(self, pixels: Pixels, label: int) -> Floats:
        """How each place of the last maps speaks for a label, float32 (h, w). Raises `BadRequest`."""
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
        """Where the places of the last maps lie: in the middle of what they see, where that can be told."""
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
