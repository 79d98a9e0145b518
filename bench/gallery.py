"""Pictures with known answers: drawn by seed, and answered by an undisturbed service once per version."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fovea.bench.kinds import build_png_header, draw_huge_jpeg, encode_picture, overwrite_image
from fovea.bench.swaps import rotation_of
from fovea.bench.workloads import BenchError

LabelProbabilities = Mapping[str, float]
"""Probability of each label."""

RankedLabels = list[tuple[str, float]]
"""(label, probability) pairs, best first."""

TOLERANCE: Final = 1e-3
"""Tolerance of a probability; batch size and number of threads change the seventh digit."""

_MIN_DIFFERENCE: Final = 10 * TOLERANCE
"""Minimum difference between the answers to two pictures, so that no answer fits two of them."""

_FORMATS: Final[tuple[tuple[str, dict[str, int]], ...]] = (
    ("JPEG", {"quality": 92}),
    ("PNG", {}),
    ("WEBP", {"quality": 90}),
    ("BMP", {}),
)


@dataclass
class Picture:
    """An encoded picture and its right answers."""

    name: str
    content: bytes
    expected_by_rotation: dict[int, LabelProbabilities] = field(default_factory=dict)
    """The right answer for each rotation of the labels (see `swaps.rotation_of`)."""


@dataclass(frozen=True)
class RequestFormat:
    """A request format: the request for some pictures and the parser of its answer."""

    name: str
    route: str
    """Template of the route, as in the service's metrics."""
    path: str
    """Path, with `{model}` in place of the model's name."""
    build_body: Callable[[Sequence[Picture], str], tuple[bytes, dict[str, str]]]
    """Function that makes the body and the headers; the text is a boundary that no picture contains."""
    parse_response: Callable[[Any], Sequence[RankedLabels | None]]
    """Function from the answer's JSON to a row for each picture, None for an error."""
    max_pictures: int = 1
    """Maximum number of pictures in one request."""
    method: str = "POST"

    @property
    def has_model_name(self) -> bool:
        """Flag for a path that names the model; otherwise the default model answers."""
        return "{model}" in self.path


# --- pictures ------------------------------------------------------------------------------------


def draw_pictures(count: int, seed: int) -> list[Picture]:
    """Draw pictures of smooth random colours, of many sizes and formats."""
    pictures = []
    for number in range(count):
        generator = np.random.default_rng((seed, number))
        width, height = (int(one) for one in generator.integers(24, 500, 2))
        coarse = generator.integers(
            0, 256, (int(generator.integers(2, 9)), int(generator.integers(2, 9)), 3), np.uint8
        )
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image_format, options = _FORMATS[number % len(_FORMATS)]
        pictures.append(Picture(f"picture {number}", encode_picture(picture, image_format, **options)))
    return pictures


def draw_giants() -> list[Picture]:
    """Return the most expensive legal pictures: few bytes with many pixels, and a phone's photograph."""
    pictures = [Picture("12 MP JPEG", draw_huge_jpeg())]
    gradient = np.add.outer(np.arange(4000), np.arange(6000)).astype(np.uint8)
    pictures.append(
        Picture(
            "24 MP PNG", encode_picture(Image.fromarray(gradient).convert("RGB"), "PNG", compress_level=1)
        )
    )
    canvas = Image.new("RGB", (7000, 7000), (40, 130, 200))
    pictures.append(Picture("49 MP WebP", encode_picture(canvas, "WEBP", method=0)))
    return pictures


def build_bombs(good: bytes) -> list[tuple[str, bytes, dict[str, str], int, str]]:
    """Return requests that must be refused: name, body, headers, status and error code."""
    plain = {"Content-Type": "application/octet-stream"}
    zeros = gzip.compress(bytes(200 << 20), 9)
    return [
        ("truncated", good[: len(good) // 2], plain, 422, "bad_image"),
        ("overwritten", overwrite_image(good), plain, 422, "bad_image"),
        ("no image", b"no image at all" * 64, plain, 415, "unsupported_format"),
        ("1,600 MP in a header", build_png_header(40_000, 40_000), plain, 413, "too_many_pixels"),
        ("gzip of 200 MB", zeros, {**plain, "Content-Encoding": "gzip"}, 413, "body_too_large"),
        ("no JSON", b'{"images": [', {"Content-Type": "application/json"}, 400, "bad_request"),
    ]


def learn_answers(url: str, model: str, versions: Sequence[str], pictures: Sequence[Picture]) -> None:
    """Learn the right answers from an undisturbed service.

    Raises `BenchError`.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    for version in versions:
        for picture in pictures:
            path = f"/v1/models/{model}/versions/{version}/classify?top_k=0"
            connection.request("POST", path, picture.content, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise BenchError(f"a calm service does not answer {picture.name}: {content[:300]!r}")
            predictions = json.loads(content)["predictions"]
            picture.expected_by_rotation[rotation_of(version)] = {
                one["label"]: one["probability"] for one in predictions
            }


def filter_distinct(pictures: Sequence[Picture]) -> list[Picture]:
    """Return the pictures whose answers, by either version, fit no other picture."""
    distinct_pictures: list[Picture] = []
    rows: list[np.ndarray[Any, Any]] = []
    for picture in pictures:
        own_rows = [
            np.array(list(dict(sorted(scores.items())).values()))
            for scores in picture.expected_by_rotation.values()
        ]
        if all(np.abs(row - one).max() > _MIN_DIFFERENCE for row in rows for one in own_rows):
            rows += own_rows
            distinct_pictures.append(picture)
    return distinct_pictures


# --- request formats -----------------------------------------------------------------------------


def _build_raw(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    return pictures[0].content, {"Content-Type": "application/octet-stream"}


def _build_form(pictures: Sequence[Picture], boundary: str) -> tuple[bytes, dict[str, str]]:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n'
    parts = b"".join(head.encode() + one.content + b"\r\n" for one in pictures)
    body = parts + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def _encode_base64(picture: Picture) -> dict[str, str]:
    return {"b64": base64.b64encode(picture.content).decode()}


def _make_json_builder(
    key: str, **extra_fields: Any
) -> Callable[[Sequence[Picture], str], tuple[bytes, dict[str, str]]]:
    def build_body(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
        body = json.dumps({key: [_encode_base64(one) for one in pictures], **extra_fields}).encode()
        return body, {"Content-Type": "application/json"}

    return build_body


def _build_open_inference(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    """Write an Open Inference Protocol request: the pictures follow the JSON, each after its length."""
    binary_data = b"".join(struct.pack("<I", len(one.content)) + one.content for one in pictures)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(pictures)],
        "parameters": {"binary_data_size": len(binary_data)},
    }
    output = {"name": "probabilities", "parameters": {"classification": 10}}
    head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    return head + binary_data, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def _parse_native(document: Any) -> list[RankedLabels | None]:
    results = document.get("results", [document])
    return [
        None if "error" in result else [(one["label"], one["probability"]) for one in result["predictions"]]
        for result in results
    ]


def _parse_torchserve(document: Any) -> list[RankedLabels]:
    return [list(one.items()) for one in (document if isinstance(document, list) else [document])]


def _parse_tensorflow(document: Any) -> list[RankedLabels]:
    return [[(label, score) for label, score in one] for one in document["result"]]


def _parse_huggingface(document: Any) -> list[RankedLabels]:
    return [[(one["label"], one["score"]) for one in document]]


def _parse_open_inference(document: Any) -> list[RankedLabels]:
    """Parse `value:index:label` entries, with one row for each picture."""
    output = document["outputs"][0]
    width = output["shape"][-1]
    entries = [(label, float(value)) for value, _, label in (one.split(":", 2) for one in output["data"])]
    return [entries[start : start + width] for start in range(0, len(entries), width)]


def _build_examples(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    body = json.dumps({"examples": [{"image": _encode_base64(one)} for one in pictures]}).encode()
    return body, {"Content-Type": "application/json"}


_INFER_PATH: Final = "/v2/models/{model}/infer"

REQUEST_FORMATS: Final = (
    RequestFormat("native", "/v1/classify", "/v1/classify?top_k=0", _build_raw, _parse_native),
    RequestFormat("native", "/v1/classify", "/v1/classify?top_k=0", _build_raw, _parse_native, method="PUT"),
    RequestFormat(
        "native, by name",
        "/v1/models/{name}/classify",
        "/v1/models/{model}/classify",
        _build_raw,
        _parse_native,
    ),
    RequestFormat(
        "native, form", "/v1/classify", "/v1/classify?top_k=0", _build_form, _parse_native, max_pictures=4
    ),
    RequestFormat(
        "native, JSON",
        "/v1/classify",
        "/v1/classify",
        _make_json_builder("images", top_k=0),
        _parse_native,
        max_pictures=4,
    ),
    RequestFormat("TorchServe", "/predictions/{name}", "/predictions/{model}", _build_raw, _parse_torchserve),
    RequestFormat(
        "TensorFlow",
        "/v1/models/{name}:classify",
        "/v1/models/{model}:classify",
        _build_examples,
        _parse_tensorflow,
        4,
    ),
    RequestFormat("Hugging Face", "/models/{name}", "/models/{model}", _build_raw, _parse_huggingface),
    RequestFormat(
        "Open Inference",
        "/v2/models/{name}/infer",
        _INFER_PATH,
        _build_open_inference,
        _parse_open_inference,
        max_pictures=4,
    ),
)


# --- verification of answers ---------------------------------------------------------------------


def find_version(document: Any) -> str | None:
    """Return the version that an answer names; None if its protocol names none."""
    if isinstance(document, dict) and isinstance(document.get("model"), dict):
        return str(document["model"]["version"])
    if isinstance(document, dict) and "model_version" in document:
        return str(document["model_version"])
    return None


def find_mistake(
    request_format: RequestFormat, pictures: Sequence[Picture], content: bytes, versions: frozenset[str]
) -> str:
    """Return the difference between an answer and the expectation.

    The result is empty if the answer is right for all pictures by one of `versions`, the versions that were
    served meanwhile.
    """
    try:
        document = json.loads(content)
        rows = request_format.parse_response(document)
        version = find_version(document)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{request_format.name}: an answer that cannot be read: {error!r}, {content[:80]!r}"
    if version is not None and version not in versions:
        return f"{request_format.name}: by version {version}, and {', '.join(sorted(versions))} is served"
    if len(rows) != len(pictures):
        return f"{request_format.name}: {len(rows)} answers to {len(pictures)} pictures"
    rotations = {rotation_of(version)} if version is not None else {rotation_of(one) for one in versions}
    misfits = {one: _find_misfit(rows, pictures, one) for one in sorted(rotations)}
    return "" if not all(misfits.values()) else f"{request_format.name}: {next(iter(misfits.values()))}"


def _find_misfit(rows: Sequence[RankedLabels | None], pictures: Sequence[Picture], rotation: int) -> str:
    for row, picture in zip(rows, pictures, strict=True):
        if row is None:
            continue
        expected = picture.expected_by_rotation[rotation]
        if not row:
            return f"{picture.name} has no labels"
        for label, score in row:
            if label not in expected or abs(expected[label] - score) > TOLERANCE:
                return f"{picture.name} is {label!r} by {score:.4f}, not {expected.get(label, 0.0):.4f}"
        if row[0][1] < max(expected.values()) - TOLERANCE:
            return f"{picture.name}: the first label is {row[0][0]!r}, which is not the most probable"
    return ""


def pick_pictures(generator: random.Random, pictures: Sequence[Picture], max_count: int) -> list[Picture]:
    """Choose between one and `max_count` different pictures."""
    return generator.sample(pictures, generator.randint(1, max_count))
