"""Warnings appear in the answers of every protocol, in the log, as a metric, and in the command's output."""

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

CLEAR = encode_image(Image.new("RGBA", (40, 40), (200, 30, 40, 0)), "PNG")
"""A fully transparent image."""

INKS = encode_image(Image.new("CMYK", (40, 40), (0, 255, 0, 0)), "JPEG")[:-2]
"""A truncated CMYK image without a colour profile."""

PLAIN = make_jpeg()


@pytest.fixture(scope="module")
def running(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        yield server


def encode_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def warning_codes(reply: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in reply.get("warnings", [])]


def test_the_answer_names_what_may_surprise(running: Server) -> None:
    before = running.read_metric("fovea_image_warnings_total", reason=WarningCode.INVISIBLE)
    reply = running.client.post("/v1/classify", content=CLEAR).json()
    assert reply["warnings"] == [
        {
            "code": "almost_nothing_visible",
            "message": "the image is transparent, and almost nothing of it is visible on white",
        }
    ]
    assert running.read_metric("fovea_image_warnings_total", reason=WarningCode.INVISIBLE) == before + 1


def test_an_everyday_photograph_has_none(running: Server) -> None:
    assert "warnings" not in running.client.post("/v1/classify", content=PLAIN).json()


def test_each_of_several_images_has_its_own(running: Server) -> None:
    files = [("file", content) for content in (PLAIN, CLEAR, INKS, b"nonsense")]
    results = running.client.post("/v1/classify", files=files).json()["results"]
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
                    "data": [encode_base64(PLAIN), encode_base64(INKS)],
                }
            ]
        },
    ),
    "tensorflow": (
        "/v1/models/small:predict",
        {"instances": [{"b64": encode_base64(PLAIN)}, {"b64": encode_base64(INKS)}]},
    ),
    "huggingface": ("/models/small", {"inputs": [encode_base64(PLAIN), encode_base64(INKS)]}),
}


@pytest.mark.parametrize("protocol", OTHERS)
def test_other_protocols_have_a_header(running: Server, protocol: str) -> None:
    path, body = OTHERS[protocol]
    reply = running.client.post(path, json=body)
    assert reply.status_code == 200
    assert reply.headers[WARNINGS_HEADER] == "end_missing=1, cmyk_without_profile=1"
    if protocol == "oip":
        assert reply.json()["parameters"] == {"warnings": "end_missing=1, cmyk_without_profile=1"}


@pytest.mark.parametrize("path", ["/predictions/small", "/models/small"])
def test_one_image_alone_has_no_number(running: Server, path: str) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    assert (
        running.client.post(path, content=CLEAR, headers=headers).headers[WARNINGS_HEADER]
        == WarningCode.INVISIBLE
    )
    assert WARNINGS_HEADER not in running.client.post(path, content=PLAIN, headers=headers).headers


def test_explanations_name_it_too(running: Server) -> None:
    assert warning_codes(post_explain(running, CLEAR)) == [WarningCode.INVISIBLE]
    assert "warnings" not in post_explain(running, PLAIN)
    painted = running.client.post("/v1/explain?format=png", content=CLEAR)
    assert painted.headers[WARNINGS_HEADER] == WarningCode.INVISIBLE
    assert (
        running.client.post("/explanations/small", content=CLEAR).headers[WARNINGS_HEADER]
        == WarningCode.INVISIBLE
    )


@pytest.mark.long
def test_the_log_counts_it(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        server.client.post("/v1/classify", files=[("file", one) for one in (PLAIN, CLEAR, CLEAR)])
    lines = [json.loads(line) for line in server.log.splitlines() if '"request"' in line]
    (line,) = [line for line in lines if line.get("route") == "/v1/classify"]
    assert line["warnings"] == {"almost_nothing_visible": 2}


@pytest.mark.long
def test_the_command_names_it(small_zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    path.write_bytes(CLEAR)
    shown = run_fovea("classify", path, zoo=small_zoo)
    assert "almost_nothing_visible: the image is transparent" in shown.stdout
    assert warning_codes(json.loads(run_fovea("classify", path, "--json", zoo=small_zoo).stdout)) == [
        "almost_nothing_visible"
    ]


def test_every_code_is_documented_and_has_a_series_from_the_start(running: Server) -> None:
    operations = Path("docs/operations.md").read_text()
    metrics = Metrics(CollectorRegistry())
    for code in WarningCode:
        assert f"| `{code}` |" in operations
        assert metrics.registry.get_sample_value("fovea_image_warnings_total", {"reason": code}) == 0
    schema = running.client.get("/openapi.json").json()["components"]["schemas"]["WarningInfo"]
    assert schema["properties"]["code"]["enum"] == [code.value for code in WarningCode]


def test_they_pass_the_socket_between_the_processes() -> None:
    row = memoryview(bytes(8)).cast("f"), memoryview(bytes(8)).cast("i")
    warnings = [
        ImageWarning(WarningCode.SIXTEEN_BITS_DARK, "it is dark"),
        ImageWarning(WarningCode.HDR, "it is bright"),
    ]
    answers = [
        Answer("PNG", 1, 2, 0.5, 0.1, *row, ImageTiming(0, 0, 0, 0, 1), warnings=one)
        for one in (warnings, [])
    ]
    (frame,) = FrameDecoder().feed(BatchReport(answers, [0.0, 0.0], 0.0, 2).to_bytes())
    read = BatchReport.from_frame(frame)
    assert isinstance(read, BatchReport)
    assert [one.warnings for one in read.answers if isinstance(one, Answer)] == [warnings, []]


def test_the_list_is_short() -> None:
    one = ImageWarning(WarningCode.SIXTEEN_BITS_DARK, "")
    assert create_warning_headers([[], []]) == {}
    assert format_warnings([[one]]) == "sixteen_bits_hardly_used"
    assert format_warnings([[], [one], [one]]) == "sixteen_bits_hardly_used=1 2"
    longest = create_warning_headers([[ImageWarning(code, "") for code in WarningCode]] * 1000)
    assert len(longest[WARNINGS_HEADER]) < 4000  # proxies take 4 or 8 KB
