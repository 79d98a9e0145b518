"""Pictures with known answers: drawn by seed, and asked of a calm service once per version."""

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

from fovea.bench.kinds import encoded, huge_jpeg, overwritten, png_header
from fovea.bench.swaps import turn_of
from fovea.bench.workloads import BenchError

Scores = Mapping[str, float]
"""Probability of each label."""

Row = list[tuple[str, float]]
"""(label, probability) pairs, best first."""

TOLERANCE: Final = 1e-3
"""Tolerance of a probability; batch size and number of threads change the seventh digit."""

_APART: Final = 10 * TOLERANCE
"""Minimum difference between the answers to two pictures, so that no answer fits two of them."""

_FORMATS: Final[tuple[tuple[str, dict[str, int]], ...]] = (
    ("JPEG", {"quality": 92}),
    ("PNG", {}),
    ("WEBP", {"quality": 90}),
    ("BMP", {}),
)


@dataclass
class Picture:
    """An encoded picture; `scores` are the right answers by the version's turn (`swaps.turn_of`)."""

    name: str
    content: bytes
    scores: dict[int, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Spelling:
    """A request format: the request for some pictures and the parser of its answer."""

    name: str
    route: str
    """Template of the route, as in the service's metrics."""
    path: str
    """Path, with `{model}` in place of the model's name."""
    write: Callable[[Sequence[Picture], str], tuple[bytes, dict[str, str]]]
    """Function that makes the body and the headers; the text is a boundary that no picture contains."""
    read: Callable[[Any], Sequence[Row | None]]
    """Function from the answer's JSON to a row for each picture, None for an error."""
    most: int = 1
    """Maximum number of pictures in one request."""
    method: str = "POST"

    @property
    def names_model(self) -> bool:
        """Flag for a path that names the model; otherwise the default model answers."""
        return "{model}" in self.path


# --- pictures ------------------------------------------------------------------------------------


def draw(count: int, seed: int) -> list[Picture]:
    """Draw pictures of smooth random colours, of many sizes and formats."""
    made = []
    for number in range(count):
        chance = np.random.default_rng((seed, number))
        width, height = (int(one) for one in chance.integers(24, 500, 2))
        coarse = chance.integers(
            0, 256, (int(chance.integers(2, 9)), int(chance.integers(2, 9)), 3), np.uint8
        )
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        kind, options = _FORMATS[number % len(_FORMATS)]
        made.append(Picture(f"picture {number}", encoded(picture, kind, **options)))
    return made


def giants() -> list[Picture]:
    """Return the most expensive legal pictures: few bytes with many pixels, and a phone's photograph."""
    made = [Picture("12 MP JPEG", huge_jpeg())]
    gradient = np.add.outer(np.arange(4000), np.arange(6000)).astype(np.uint8)
    made.append(
        Picture("24 MP PNG", encoded(Image.fromarray(gradient).convert("RGB"), "PNG", compress_level=1))
    )
    wide = Image.new("RGB", (7000, 7000), (40, 130, 200))
    made.append(Picture("49 MP WebP", encoded(wide, "WEBP", method=0)))
    return made


def bombs(good: bytes) -> list[tuple[str, bytes, dict[str, str], int, str]]:
    """Return requests that must be refused: name, body, headers, status and error code."""
    plain = {"Content-Type": "application/octet-stream"}
    zeros = gzip.compress(bytes(200 << 20), 9)
    return [
        ("truncated", good[: len(good) // 2], plain, 422, "bad_image"),
        ("overwritten", overwritten(good), plain, 422, "bad_image"),
        ("no image", b"no image at all" * 64, plain, 415, "unsupported_format"),
        ("1,600 MP in a header", png_header(40_000, 40_000), plain, 413, "too_many_pixels"),
        ("gzip of 200 MB", zeros, {**plain, "Content-Encoding": "gzip"}, 413, "body_too_large"),
        ("no JSON", b'{"images": [', {"Content-Type": "application/json"}, 400, "bad_request"),
    ]


def ask_calmly(url: str, model: str, versions: Sequence[str], pictures: Sequence[Picture]) -> None:
    """Learn the right answers from an undisturbed service.

    Raises `BenchError`.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    for version in versions:
        for picture in pictures:
            path = f"/v1/models/{model}/versions/{version}/classify?top_k=0"
            connection.request("POST", path, picture.content, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise BenchError(f"a calm service does not answer {picture.name}: {content[:300]!r}")
            found = json.loads(content)["predictions"]
            picture.scores[turn_of(version)] = {one["label"]: one["probability"] for one in found}


def distinct(pictures: Sequence[Picture]) -> list[Picture]:
    """Return the pictures whose answers, by either version, fit no other picture."""
    kept: list[Picture] = []
    rows: list[np.ndarray[Any, Any]] = []
    for picture in pictures:
        mine = [np.array(list(dict(sorted(scores.items())).values())) for scores in picture.scores.values()]
        if all(np.abs(row - one).max() > _APART for row in rows for one in mine):
            rows += mine
            kept.append(picture)
    return kept


# --- request formats -----------------------------------------------------------------------------


def _raw(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    return pictures[0].content, {"Content-Type": "application/octet-stream"}


def _form(pictures: Sequence[Picture], boundary: str) -> tuple[bytes, dict[str, str]]:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n'
    parts = b"".join(head.encode() + one.content + b"\r\n" for one in pictures)
    body = parts + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def _b64(picture: Picture) -> dict[str, str]:
    return {"b64": base64.b64encode(picture.content).decode()}


def _json_as(key: str, **more: Any) -> Callable[[Sequence[Picture], str], tuple[bytes, dict[str, str]]]:
    def write(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
        body = json.dumps({key: [_b64(one) for one in pictures], **more}).encode()
        return body, {"Content-Type": "application/json"}

    return write


def _infer(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    """Write an Open Inference Protocol request: the pictures follow the JSON, each after its length."""
    behind = b"".join(struct.pack("<I", len(one.content)) + one.content for one in pictures)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(pictures)],
        "parameters": {"binary_data_size": len(behind)},
    }
    wanted = {"name": "probabilities", "parameters": {"classification": 10}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    return head + behind, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def _native(answer: Any) -> list[Row | None]:
    results = answer.get("results", [answer])
    return [
        None if "error" in result else [(one["label"], one["probability"]) for one in result["predictions"]]
        for result in results
    ]


def _torchserve(answer: Any) -> list[Row]:
    return [list(one.items()) for one in (answer if isinstance(answer, list) else [answer])]


def _tensorflow(answer: Any) -> list[Row]:
    return [[(label, score) for label, score in one] for one in answer["result"]]


def _huggingface(answer: Any) -> list[Row]:
    return [[(one["label"], one["score"]) for one in answer]]


def _inferred(answer: Any) -> list[Row]:
    """Parse `value:index:label` entries, with one row for each picture."""
    output = answer["outputs"][0]
    width = output["shape"][-1]
    flat = [(label, float(value)) for value, _, label in (one.split(":", 2) for one in output["data"])]
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def _examples(pictures: Sequence[Picture], _boundary: str) -> tuple[bytes, dict[str, str]]:
    body = json.dumps({"examples": [{"image": _b64(one)} for one in pictures]}).encode()
    return body, {"Content-Type": "application/json"}


_INFER: Final = "/v2/models/{model}/infer"

SPELLINGS: Final = (
    Spelling("native", "/v1/classify", "/v1/classify?top_k=0", _raw, _native),
    Spelling("native", "/v1/classify", "/v1/classify?top_k=0", _raw, _native, method="PUT"),
    Spelling("native, by name", "/v1/models/{name}/classify", "/v1/models/{model}/classify", _raw, _native),
    Spelling("native, form", "/v1/classify", "/v1/classify?top_k=0", _form, _native, most=4),
    Spelling("native, JSON", "/v1/classify", "/v1/classify", _json_as("images", top_k=0), _native, most=4),
    Spelling("TorchServe", "/predictions/{name}", "/predictions/{model}", _raw, _torchserve),
    Spelling(
        "TensorFlow", "/v1/models/{name}:classify", "/v1/models/{model}:classify", _examples, _tensorflow, 4
    ),
    Spelling("Hugging Face", "/models/{name}", "/models/{model}", _raw, _huggingface),
    Spelling("Open Inference", "/v2/models/{name}/infer", _INFER, _infer, _inferred, most=4),
)


# --- verification of answers ---------------------------------------------------------------------


def version_in(answer: Any) -> str | None:
    """Return the version that an answer names; None if its protocol names none."""
    if isinstance(answer, dict) and isinstance(answer.get("model"), dict):
        return str(answer["model"]["version"])
    if isinstance(answer, dict) and "model_version" in answer:
        return str(answer["model_version"])
    return None


def mistake(spelling: Spelling, pictures: Sequence[Picture], content: bytes, served: frozenset[str]) -> str:
    """Return the difference between an answer and the expectation.

    The result is empty if the answer is right for all pictures by one of the versions that were `served`
    meanwhile.
    """
    try:
        answer = json.loads(content)
        rows = spelling.read(answer)
        version = version_in(answer)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{spelling.name}: an answer that cannot be read: {error!r}, {content[:80]!r}"
    if version is not None and version not in served:
        return f"{spelling.name}: by version {version}, and {', '.join(sorted(served))} is served"
    if len(rows) != len(pictures):
        return f"{spelling.name}: {len(rows)} answers to {len(pictures)} pictures"
    turns = {turn_of(version)} if version is not None else {turn_of(one) for one in served}
    said = {turn: _misfits(rows, pictures, turn) for turn in sorted(turns)}
    return "" if not all(said.values()) else f"{spelling.name}: {next(iter(said.values()))}"


def _misfits(rows: Sequence[Row | None], pictures: Sequence[Picture], turn: int) -> str:
    for row, picture in zip(rows, pictures, strict=True):
        if row is None:
            continue
        scores = picture.scores[turn]
        if not row:
            return f"{picture.name} has no labels"
        for label, score in row:
            if label not in scores or abs(scores[label] - score) > TOLERANCE:
                return f"{picture.name} is {label!r} by {score:.4f}, not {scores.get(label, 0.0):.4f}"
        if row[0][1] < max(scores.values()) - TOLERANCE:
            return f"{picture.name}: the first label is {row[0][0]!r}, which is not the most probable"
    return ""


def picks(chance: random.Random, pictures: Sequence[Picture], most: int) -> list[Picture]:
    """Choose between one and `most` different pictures."""
    return chance.sample(pictures, chance.randint(1, most))
