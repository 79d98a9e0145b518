"""Warnings appear in replies of every protocol, in the log, as a metric, and in the output of the command."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from fovea.service.image_warnings import (
    WARNINGS_HEADER,
    ImageWarning,
    WarningCode,
    create_warning_headers,
    format_warnings,
)
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import Answer, BatchReport, ImageTiming
from fovea.service.runners.frames import FrameDecoder
from tests.pictures import encode_image, make_jpeg
from tests.servers import Server
from tests.service.api.test_explain import post_explain
from tests.test_command import run_fovea

TRANSPARENT = encode_image(Image.new("RGBA", (40, 40), (200, 30, 40, 0)), "PNG")
"""A fully transparent image."""

TRUNCATED_CMYK = encode_image(Image.new("CMYK", (40, 40), (0, 255, 0, 0)), "JPEG")[:-2]
"""A truncated CMYK image without a colour profile."""

ORDINARY = make_jpeg()


@pytest.fixture(scope="module")
def default_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        yield server


def encode_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def warning_codes(reply: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in reply.get("warnings", [])]


def test_reply_contains_the_warning(default_server: Server) -> None:
    count_before = default_server.read_metric("fovea_image_warnings_total", reason=WarningCode.INVISIBLE)
    reply = default_server.client.post("/v1/classify", content=TRANSPARENT).json()
    assert reply["warnings"] == [
        {
            "code": "almost_nothing_visible",
            "message": "the image is transparent, and almost nothing of it is visible on white",
        }
    ]
    assert (
        default_server.read_metric("fovea_image_warnings_total", reason=WarningCode.INVISIBLE)
        == count_before + 1
    )


def test_ordinary_photo_has_no_warnings(default_server: Server) -> None:
    assert "warnings" not in default_server.client.post("/v1/classify", content=ORDINARY).json()


def test_each_image_has_its_own_warnings(default_server: Server) -> None:
    files = [("file", content) for content in (ORDINARY, TRANSPARENT, TRUNCATED_CMYK, b"nonsense")]
    results = default_server.client.post("/v1/classify", files=files).json()["results"]
    assert [warning_codes(result) for result in results] == [
        [],
        [WarningCode.INVISIBLE],
        [WarningCode.END_MISSING, WarningCode.NO_PROFILE],
        [],
    ]
    assert "error" in results[3]


OTHERS: dict[str, tuple[str, Any]] = {
    "oip": (
        "/v2/models/small/infer",
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [2],
                    "datatype": "BYTES",
                    "data": [encode_base64(ORDINARY), encode_base64(TRUNCATED_CMYK)],
                }
            ]
        },
    ),
    "tensorflow": (
        "/v1/models/small:predict",
        {"instances": [{"b64": encode_base64(ORDINARY)}, {"b64": encode_base64(TRUNCATED_CMYK)}]},
    ),
    "huggingface": ("/models/small", {"inputs": [encode_base64(ORDINARY), encode_base64(TRUNCATED_CMYK)]}),
}


@pytest.mark.parametrize("protocol", OTHERS)
def test_other_protocols_send_a_warning_header(default_server: Server, protocol: str) -> None:
    path, body = OTHERS[protocol]
    reply = default_server.client.post(path, json=body)
    assert reply.status_code == 200
    assert reply.headers[WARNINGS_HEADER] == "end_missing=1, cmyk_without_profile=1"
    if protocol == "oip":
        assert reply.json()["parameters"] == {"warnings": "end_missing=1, cmyk_without_profile=1"}


@pytest.mark.parametrize("path", ["/predictions/small", "/models/small"])
def test_header_for_a_single_image_has_no_index(default_server: Server, path: str) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    assert (
        default_server.client.post(path, content=TRANSPARENT, headers=headers).headers[WARNINGS_HEADER]
        == WarningCode.INVISIBLE
    )
    assert WARNINGS_HEADER not in default_server.client.post(path, content=ORDINARY, headers=headers).headers


def test_explanations_contain_the_warning(default_server: Server) -> None:
    assert warning_codes(post_explain(default_server, TRANSPARENT)) == [WarningCode.INVISIBLE]
    assert "warnings" not in post_explain(default_server, ORDINARY)
    png_reply = default_server.client.post("/v1/explain?format=png", content=TRANSPARENT)
    assert png_reply.headers[WARNINGS_HEADER] == WarningCode.INVISIBLE
    assert (
        default_server.client.post("/explanations/small", content=TRANSPARENT).headers[WARNINGS_HEADER]
        == WarningCode.INVISIBLE
    )


@pytest.mark.long
def test_log_counts_the_warnings(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        server.client.post(
            "/v1/classify", files=[("file", content) for content in (ORDINARY, TRANSPARENT, TRANSPARENT)]
        )
    lines = [json.loads(line) for line in server.log.splitlines() if '"request"' in line]
    (line,) = [line for line in lines if line.get("route") == "/v1/classify"]
    assert line["warnings"] == {"almost_nothing_visible": 2}


@pytest.mark.long
def test_command_prints_the_warning(small_zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    path.write_bytes(TRANSPARENT)
    result = run_fovea("classify", path, zoo=small_zoo)
    assert "almost_nothing_visible: the image is transparent" in result.stdout
    assert warning_codes(json.loads(run_fovea("classify", path, "--json", zoo=small_zoo).stdout)) == [
        "almost_nothing_visible"
    ]


def test_every_code_is_documented_and_has_a_metric(default_server: Server) -> None:
    operations = Path("docs/operations.md").read_text()
    metrics = Metrics(CollectorRegistry())
    for code in WarningCode:
        assert f"| `{code}` |" in operations
        assert metrics.registry.get_sample_value("fovea_image_warnings_total", {"reason": code}) == 0
    schema = default_server.client.get("/openapi.json").json()["components"]["schemas"]["WarningInfo"]
    assert schema["properties"]["code"]["enum"] == [code.value for code in WarningCode]


def test_warnings_survive_encoding_of_the_batch_report() -> None:
    row = memoryview(bytes(8)).cast("f"), memoryview(bytes(8)).cast("i")
    warnings = [
        ImageWarning(WarningCode.SIXTEEN_BITS_DARK, "it is dark"),
        ImageWarning(WarningCode.HDR, "it is bright"),
    ]
    answers = [
        Answer("PNG", 1, 2, 0.5, 0.1, None, *row, ImageTiming(0, 0, 0, 0, 1), warnings=image_warnings)
        for image_warnings in (warnings, [])
    ]
    (frame,) = FrameDecoder().feed(BatchReport(answers, [0.0, 0.0], 0.0, 2).to_bytes())
    decoded = BatchReport.from_frame(frame)
    assert isinstance(decoded, BatchReport)
    assert [answer.warnings for answer in decoded.answers if isinstance(answer, Answer)] == [warnings, []]


def test_warning_header_is_short() -> None:
    warning = ImageWarning(WarningCode.SIXTEEN_BITS_DARK, "")
    assert create_warning_headers([[], []]) == {}
    assert format_warnings([[warning]]) == "sixteen_bits_hardly_used"
    assert format_warnings([[], [warning], [warning]]) == "sixteen_bits_hardly_used=1 2"
    headers = create_warning_headers([[ImageWarning(code, "") for code in WarningCode]] * 1000)
    assert len(headers[WARNINGS_HEADER]) < 4000  # proxies take 4 or 8 KB
