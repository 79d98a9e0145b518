"""Heat maps that explain the answer to one image.

The maps are computed with plain ONNX Runtime, without gradients. The code runs in a process of its own
(`service.explain.process`), and in the command `fovea explain`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Final, Literal

import numpy as np
from PIL import Image

from fovea.service.artifact.contract import Contract, Task
from fovea.service.artifact.onnx_edit import add_outputs
from fovea.service.errors import BadRequest, Internal, to_one_line
from fovea.service.explain.cam import Cam, Head, find_head, verify_cam
from fovea.service.explain.heatmap import (
    MAX_PHOTO_SIDE,
    Centres,
    Heatmap,
    InputRegion,
    compute_even_centres,
    compute_field_centres,
    compute_grid_size,
    draw_overlay,
)
from fovea.service.explain.layers import find_receptive_field
from fovea.service.explain.messages import (
    ExplanationRequest,
    InputPicture,
    ModelInput,
    Photo,
    PreprocessingStep,
)
from fovea.service.explain.occlusion import Occlusion, OcclusionStep
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.engine import Floats
from fovea.service.inference.known import compute_known_scores
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image, decode_upright
from fovea.service.inference.session import open_session, run_outputs
from fovea.service.runners.load_messages import ProcessPlan

_BATCH_SIZE: Final = 16
"""Number of masked images in one model call, which is also the step of a progress bar."""

_MAX_GRID_SIDE: Final = 96
"""Longest side of a heat map that is returned as numbers."""


@dataclass(frozen=True)
class Explanation:
    """An explanation of one label of an image."""

    label: int
    method: Literal["cam", "occlusion"]
    note: str | None
    """Reason why there is no class activation map, or None."""
    samples: int
    """Number of masked images that were classified."""
    heatmap: Floats
    """Heat map over the photo, float32 (height, width), 0 … 1."""
    picture: bytes
    """PNG, empty unless it was requested."""


class Explainer:
    """An explainer of one model.

    Only one thread at a time may use an explainer. The explaining process uses it on its only thread.
    """

    def __init__(self, model: bytes, contract: Contract, plan: ProcessPlan) -> None:
        """Load the model from the content of its file.

        Raises `ModelError` if the model cannot be loaded at all.
        """
        self.contract = contract
        self._image_pixels = plan.image_pixels
        self._memory = DecodeMemory(plan.decode_bytes)
        self._occlusion: Occlusion | None = None
        """The last occlusion, which serves every label of its image."""
        self._cam: Cam | str
        try:
            head = find_head(contract)
            names = [head.maps, *([head.weight] if head.weight else [])]
            self._session = open_session(
                add_outputs(model, names), plan.explaining_provider, plan.max_threads
            )
            self._cam = verify_cam(head, contract, self._run_session)
            self._centres = self._find_centres(head)
        except Exception as error:
            # Whatever the error is, an occlusion is still possible: it knows nothing about the network.
            self._cam = to_one_line(error)
            self._session = open_session(model, plan.explaining_provider, plan.max_threads)

    def classify_image(self, image: bytes) -> tuple[Pixels, InputRegion, ModelInput]:
        """Decode an image and classify it. Return the pixels, their region of the photo, and the answer.

        Raises the errors of `decode_image`.
        """
        trace = DecodeTrace()
        decoded_image = decode_image(
            image,
            self.contract.input,
            max_pixels=self._image_pixels,
            memory=self._memory,
            trace=trace,
        )
        pixels = decoded_image.pixels
        names = [self.contract.probabilities_name, self.contract.logits_name]
        (probabilities,), logits = self._run_session(names, pixels[None])
        if not np.isfinite(probabilities).all():
            raise Internal("the model's answer to this image is not finite (NaN or infinite)")
        region = InputRegion((decoded_image.width, decoded_image.height), trace.crop_box, pixels.shape[:2])
        height, width = region.input_size
        steps = [PreprocessingStep(*step) for step in trace.steps]
        picture = InputPicture(width, height, _encode_png(pixels), region.box, steps)
        photo = Photo(decoded_image.format, *region.photo_size)
        known_score = (
            float(compute_known_scores(logits, self.contract.task)[0]) if self.contract.known else None
        )
        model_input = ModelInput(probabilities.tolist(), known_score, photo, decoded_image.warnings, picture)
        return pixels, region, model_input

    def explain(
        self,
        image: bytes,
        request: ExplanationRequest,
        on_start: Callable[[ModelInput], None],
        on_step: Callable[[OcclusionStep, Callable[[], Floats]], None],
    ) -> Explanation:
        """Explain one image.

        `on_start` is called once and first, with the model's input. During an occlusion `on_step` is called
        after each step, with a function that returns the current map over the photo. Both run in the calling
        thread, and no step runs until they return. An exception of `on_step` stops the occlusion and passes
        to the caller.

        Raises the errors of `decode_image`, and `BadRequest` if the network does not allow the method.
        """
        if request.method == "cam":
            self._require_cam()
        pixels, region, model_input = self.classify_image(image)
        if request.picture and max(region.photo_size) > MAX_PHOTO_SIDE:
            raise BadRequest(
                f"the photo has a side of {max(region.photo_size)} pixels; a picture may have at "
                f"most {MAX_PHOTO_SIDE}; ask for format=json"
            )
        on_start(model_input)
        label = int(np.argmax(model_input.probabilities)) if request.label is None else request.label
        grid = compute_grid_size(region.photo_size, _MAX_GRID_SIDE)
        samples = 0
        note = None
        if isinstance(self._cam, str) or request.method == "occlusion":
            for step in self._run_occlusion(pixels, label, request):
                heatmap = self._create_even_heatmap(step.heatmap)
                samples = step.samples
                on_step(step, partial(heatmap.project_to_grid, region, grid))
            note = self._cam if isinstance(self._cam, str) else None
        else:
            heatmap = Heatmap(self.compute_class_map(pixels, label), *self._centres)
        if not np.isfinite(heatmap.values).all():
            raise Internal("the model's maps of this image are not finite (NaN or infinite)")
        picture = b""
        if request.picture:
            photo = decode_upright(image, max_pixels=self._image_pixels, memory=self._memory)
            picture = draw_overlay(photo, heatmap, region)
        method: Literal["cam", "occlusion"] = "occlusion" if samples else "cam"
        return Explanation(label, method, note, samples, heatmap.project_to_grid(region, grid), picture)

    @property
    def has_cam(self) -> bool:
        """True if the network has class activation maps."""
        return not isinstance(self._cam, str)

    def compute_class_map(self, pixels: Pixels, label: int) -> Floats:
        """Return the evidence for a label at each place of the last feature maps, float32 (h, w).

        Raises `BadRequest` if the network has no class activation maps.
        """
        cam = self._require_cam()
        return cam.compute_map(self._run_session([cam.head.maps], pixels[None])[0], label)

    def _require_cam(self) -> Cam:
        if isinstance(self._cam, str):
            raise BadRequest(f"there is no class activation map: {self._cam}; ask for method=occlusion")
        return self._cam

    def _run_occlusion(
        self, pixels: Pixels, label: int, request: ExplanationRequest
    ) -> Iterator[OcclusionStep]:
        """Return the steps of an occlusion; continue the last one if it is of this image."""
        is_binary = self.contract.task is Task.BINARY

        def compute_logits(batch: Pixels) -> Floats:
            return self._run_session([self.contract.logits_name], batch)[0]

        def select_values(logits: Floats) -> Floats:
            return (logits[:, 0] if label else -logits[:, 0]) if is_binary else logits[:, label]

        if self._occlusion is None or not self._occlusion.is_about(pixels, request.seed):
            self._occlusion = Occlusion(compute_logits, pixels, seed=request.seed, batch_size=_BATCH_SIZE)
        return self._occlusion.iterate_steps(select_values, samples=request.samples, seconds=request.seconds)

    def _find_centres(self, head: Head) -> tuple[Centres, Centres]:
        """Return the positions of the last feature maps' places on the input.

        The position is the centre of the receptive field if it is known; otherwise the places are spread
        evenly.
        """
        receptive_field, geometry = find_receptive_field(self.contract, head.maps), self.contract.input
        _, height, width = head.layout.shape
        if receptive_field is None:
            return compute_even_centres(height, geometry.height), compute_even_centres(width, geometry.width)
        return compute_field_centres(receptive_field.rows, height), compute_field_centres(
            receptive_field.columns, width
        )

    def _create_even_heatmap(self, values: Floats) -> Heatmap:
        geometry = self.contract.input
        return Heatmap(
            values,
            compute_even_centres(len(values), geometry.height),
            compute_even_centres(values.shape[1], geometry.width),
        )

    def _run_session(self, names: list[str], batch: Pixels) -> list[Floats]:
        return [np.asarray(values, np.float32) for values in run_outputs(self._session, names, batch)]


def _encode_png(pixels: Pixels) -> str:
    """Return a PNG as base64."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return b64encode(content.getvalue()).decode()
