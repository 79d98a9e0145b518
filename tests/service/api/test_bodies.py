"""Good images are read from unusual forms, base64 and JSON, in every protocol."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from fovea.service.api.json_bodies import parse_json_body
from fovea.service.inference.boxes import MAX_BOXES
from fovea.service.settings import MAX_REQUEST_IMAGES
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server
from tests.service.api.test_protocols import ASKED, error_code

CLASSIFY = "/v1/classify"
TENSORFLOW = "/v1/models/small:predict"
IMAGE = make_jpeg()
FORM = "multipart/form-data; boundary=x"
FORM_END = b"\r\n--x--\r\n"


def form_part(content: bytes, *headers: bytes) -> bytes:
    """Return one part of a form, with the delimiter before it."""
    return b"--x\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + content


def post_body(server: Server, content: bytes, content_type: str, path: str = CLASSIFY) -> httpx.Response:
    return server.client.post(path, content=content, headers={"Content-Type": content_type})


@pytest.fixture(scope="module")
def expected_reply(server: Server) -> Any:
    """The reply to the raw image."""
    return server.client.post(CLASSIFY, content=IMAGE).json()


# --- forms ---------------------------------------------------------------------------------------

NAME_HEADER = b'Content-Disposition: form-data; name="f"'
FILE_HEADER = NAME_HEADER + b'; filename="a.jpg"'

FORMS: dict[str, tuple[bytes, str]] = {
    "an image type and no file name": (
        form_part(IMAGE, NAME_HEADER, b"Content-Type: image/jpeg") + FORM_END,
        FORM,
    ),
    "an image type and no name at all": (form_part(IMAGE, b"content-type: Image/JPEG") + FORM_END, FORM),
    "bytes of no type and no file name": (
        form_part(IMAGE, NAME_HEADER, b"Content-Type: application/octet-stream") + FORM_END,
        FORM,
    ),
    "neither type nor file name": (form_part(IMAGE, NAME_HEADER) + FORM_END, FORM),
    "a preamble": (b"This is a multipart message.\r\n" + form_part(IMAGE, FILE_HEADER) + FORM_END, FORM),
    "a preamble of several lines": (
        b"\r\nOne -- two\r\n- three.\r\n\r\n" + form_part(IMAGE, FILE_HEADER) + FORM_END,
        FORM,
    ),
    "an epilogue": (form_part(IMAGE, FILE_HEADER) + FORM_END + b"This was it.\r\n--x\r\n", FORM),
    "blanks behind the delimiters": (
        form_part(b"hello\r\n", NAME_HEADER).replace(b"--x", b"--x \t")
        + form_part(IMAGE, FILE_HEADER).replace(b"--x", b"--x  ")
        + FORM_END[:-2]
        + b" \r\n",
        FORM,
    ),
    "a quoted boundary": (form_part(IMAGE, FILE_HEADER) + FORM_END, 'multipart/form-data; boundary="x"'),
    "another case": (
        form_part(IMAGE, FILE_HEADER) + FORM_END,
        "Multipart/Form-Data; charset=utf-8; BOUNDARY=x",
    ),
    "a quoted boundary with blanks": (
        b"--a b: c\r\n" + FILE_HEADER + b"\r\n\r\n" + IMAGE + b"\r\n--a b: c--",
        'multipart/form-data;boundary="a b: c"',
    ),
    "an extended file name in capitals": (
        form_part(IMAGE, NAME_HEADER + b"; FileName* = UTF-8''caf%C3%A9.jpg") + FORM_END,
        FORM,
    ),
    "base64 in lines": (
        form_part(base64.encodebytes(IMAGE), FILE_HEADER, b"Content-Transfer-Encoding: BASE64") + FORM_END,
        FORM,
    ),
    "a transfer encoding that changes nothing": (
        form_part(IMAGE, FILE_HEADER, b"Content-Transfer-Encoding: binary") + FORM_END,
        FORM,
    ),
    "text fields beside it": (
        form_part(b"hello\r\n", NAME_HEADER)
        + form_part("café\r\n".encode(), NAME_HEADER)
        + form_part(b"caf\xe9\r\n", NAME_HEADER)
        + form_part(IMAGE, FILE_HEADER)
        + FORM_END,
        FORM,
    ),
}


@pytest.mark.parametrize("form_name", FORMS)
def test_unusual_form_is_read(server: Server, expected_reply: Any, form_name: str) -> None:
    content, content_type = FORMS[form_name]
    assert post_body(server, content, content_type).json() == expected_reply
    chunked_reply = server.client.post(
        CLASSIFY, content=iter([content]), headers={"Content-Type": content_type}
    )
    assert chunked_reply.json() == expected_reply


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG"])
def test_image_format_is_recognised_in_untyped_part(server: Server, kind: str) -> None:
    content = encode_image(draw_picture(300, 200), kind)
    reply = post_body(server, form_part(content, NAME_HEADER) + FORM_END, FORM)
    assert reply.json() == server.client.post(CLASSIFY, content=content).json()


def test_images_without_file_names_are_all_classified(server: Server, expected_reply: Any) -> None:
    parts = (
        form_part(IMAGE, NAME_HEADER, b"Content-Type: image/jpeg") + b"\r\n"
        + form_part(IMAGE, FILE_HEADER) + b"\r\n"
        + form_part(IMAGE, NAME_HEADER) + FORM_END
    )  # fmt: skip
    results = post_body(server, b"preamble\r\n" + parts, FORM).json()["results"]
    assert [result["predictions"] for result in results] == 3 * [expected_reply["predictions"]]


def test_large_form_with_preamble_is_read(server: Server) -> None:
    """The form is in the memory that the runners share."""
    large_image = encode_image(draw_picture(400, 300), "BMP")
    assert len(large_image) > 256 << 10
    reply = post_body(server, b"preamble\r\n" + form_part(large_image, FILE_HEADER) + FORM_END, FORM)
    assert reply.json() == server.client.post(CLASSIFY, content=large_image).json()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            form_part(IMAGE, FILE_HEADER, b"Content-Transfer-Encoding: quoted-printable") + FORM_END,
            "'quoted-printable'",
        ),
        (
            form_part(b"@@@@", FILE_HEADER, b"Content-Transfer-Encoding: base64") + FORM_END,
            "file 0 is not base64",
        ),
        (form_part(b"hello", NAME_HEADER) + FORM_END, "has no file"),
        (b"no delimiter", "malformed"),
    ],
)
def test_unreadable_form_error_names_the_reason(server: Server, content: bytes, message: str) -> None:
    reply = post_body(server, content, FORM)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert message in reply.json()["error"]["message"]


# --- options -------------------------------------------------------------------------------------


def test_form_fields_can_set_options(server: Server, expected_reply: Any) -> None:
    files = {"file": IMAGE}
    reply = server.client.post(f"{CLASSIFY}?top_k=3", files=files, data={"top_k": "1", "note": "hello"})
    assert reply.json()["predictions"] == expected_reply["predictions"][:1]
    reply = server.client.post(CLASSIFY, files=files, data={"coverage": "0.9"})
    assert reply.json()["coverage"]["level"] == 0.9


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("topk", "3", "did you mean top_k?"),
        ("Top-K", "3", "did you mean top_k?"),
        ("treshold", "0.5", "did you mean threshold?"),
        ("top_k", "many", "top_k: "),
        ("top_k", ["1", "2"], "top_k twice"),
    ],
)
def test_bad_option_in_form_is_refused(server: Server, field: str, value: Any, message: str) -> None:
    reply = server.client.post(CLASSIFY, files={"file": IMAGE}, data={field: value})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("topk=3", "did you mean top_k?"),
        ("TOP_K=3", "did you mean top_k?"),
        ("colour=red", "there are top_k, threshold, coverage, embedding, boxes, timing"),
        ("top_k=3&top_k=5", "'top_k' twice"),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_bad_query_parameter_is_refused(server: Server, query: str, message: str, is_chunked: bool) -> None:
    content: Any = iter([IMAGE]) if is_chunked else IMAGE
    reply = server.client.post(f"{CLASSIFY}?{query}", content=content)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("protocol", ["oip", "torchserve", "tensorflow", "huggingface"])
def test_native_options_are_refused_by_other_protocols(server: Server, protocol: str) -> None:
    path, body = ASKED[protocol]
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    url = path.format("small")
    reply = server.client.post(f"{url}?top_k=2", **content)
    assert (reply.status_code, error_code(reply, protocol)) == (400, "bad_request")
    assert "top_k" in reply.text
    assert server.client.post(f"{url}?key=of-a-gateway", **content).status_code == 200


def test_explain_options_in_body_are_used_or_refused(server: Server) -> None:
    body = {"images": [{"b64": base64.b64encode(IMAGE).decode()}], "top_k": 2}
    assert len(server.client.post("/v1/explain", json=body).json()["predictions"]) == 2
    reply = server.client.post("/v1/explain", json={**body, "threshold": 0.5})
    assert (reply.status_code, "threshold" in reply.text) == (400, True)
    reply = server.client.post("/explanations/small?top_k=2", content=IMAGE)
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")
    reply = server.client.post("/explanations/small", files={"data": IMAGE}, data={"top_k": "2"})
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")


# --- base64 --------------------------------------------------------------------------------------

PADDED_IMAGE = next(make_jpeg(seed=seed) for seed in range(100) if len(make_jpeg(seed=seed)) % 3 == 1)
"""An image whose base64 ends in two characters of padding."""

B64 = base64.b64encode(PADDED_IMAGE).decode()
URL_SAFE_B64 = base64.urlsafe_b64encode(PADDED_IMAGE).decode()

BASE64_VARIANTS = {
    "as it is": B64,
    "without padding": B64.rstrip("="),
    "with half of its padding": B64[:-1],
    "in the alphabet of URLs": URL_SAFE_B64,
    "in the alphabet of URLs, without padding": URL_SAFE_B64.rstrip("="),
    "in lines": "\r\n".join(B64[start : start + 76] for start in range(0, len(B64), 76)),
    "indented": "\n    ".join(["", *(B64[start : start + 64] for start in range(0, len(B64), 64)), ""]),
    "with blanks": " ".join(B64[start : start + 10] for start in range(0, len(B64), 10)),
    "a data URI": f"data:image/jpeg;base64,{B64}",
    "a data URI without a type": f"data:;base64,{B64}",
    "a data URI with parameters": f"data:image/jpeg;charset=utf-8;base64,{B64}",
    "a data URI in capitals": f"DATA:image/JPEG;BASE64,{B64}",
    "a data URI of another type": f"data:application/octet-stream;base64,{B64.rstrip('=')}",
    "a data URI in another alphabet": f"data:image/jpeg;base64,{URL_SAFE_B64}",
    "a data URI inside a URL": "data:image/jpeg;base64,"
    + B64.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "a data URI in lines": f" data:image/jpeg;base64,\n{B64[:100]}\n{B64[100:]}\n",
}

BODIES: dict[str, tuple[str, Any]] = {
    "native": ("/v1/classify", lambda text: {"images": [{"b64": text}]}),
    "explain": ("/v1/explain", lambda text: {"images": [{"b64": text}]}),
    "oip": (
        "/v2/models/small/infer",
        lambda text: {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]},
    ),
    "torchserve": ("/predictions/small", lambda text: {"data": text}),
    "torchserve, explained": ("/explanations/small", lambda text: {"data": text}),
    "tensorflow": ("/v1/models/small:predict", lambda text: {"instances": [{"b64": text}]}),
    "tensorflow, columns": ("/v1/models/small:predict", lambda text: {"inputs": {"b64": text}}),
    "tensorflow, classify": (
        "/v1/models/small:classify",
        lambda text: {"examples": [{"image": {"b64": text}}]},
    ),
    "huggingface": ("/predict", lambda text: {"inputs": text}),
}


@pytest.mark.parametrize("body_name", BODIES)
def test_base64_variants_are_read(server: Server, body_name: str) -> None:
    path, body = BODIES[body_name]
    expected = server.client.post(path, json=body(B64)).json()
    for variant, text in BASE64_VARIANTS.items():
        reply = server.client.post(path, json=body(text))
        assert (reply.status_code, reply.json()) == (200, expected), variant


@pytest.mark.parametrize("body_name", BODIES)
def test_invalid_base64_is_refused(server: Server, body_name: str) -> None:
    path, body = BODIES[body_name]
    for text in (
        "@",
        "A",
        "AAAAA",
        "AA=A",
        "A=====",
        "data:image/jpeg,abc",
        "data:image/jpeg;base64",
        "é" * 4,
    ):
        reply = server.client.post(path, json=body(text))
        assert reply.status_code == 400, text
        assert "base64" in reply.text, text


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body_name", BODIES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_other_encodings_is_read(server: Server, body_name: str, encoding: str) -> None:
    path, body = BODIES[body_name]
    expected = server.client.post(path, json=body(B64)).json()
    content = json.dumps(body(B64)).encode(encoding)
    for content_type in ("application/json", f"Application/JSON; charset={encoding}", "text/json"):
        reply = post_body(server, content, content_type, path)
        assert (reply.status_code, reply.json()) == (200, expected)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"\xef\xbb\xbf", b'{\0"\0\0\xd8', b"\0\0\0", b"[\0"])
def test_json_with_broken_encoding_is_refused(server: Server, content: bytes) -> None:
    for protocol, path in (("native", CLASSIFY), ("huggingface", "/predict"), ("tensorflow", TENSORFLOW)):
        reply = post_body(server, content, "application/json", path)
        assert (reply.status_code, error_code(reply, protocol)) == (400, "bad_request")


# --- TorchServe's JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [B64, {"data": B64}, {"body": B64}, {"data": {"b64": B64}}], ids=["text", "data", "body", "b64"]
)
def test_torchserve_json_forms_are_read(server: Server, body: Any) -> None:
    expected = server.client.post("/predictions/small", content=PADDED_IMAGE).json()
    assert server.client.post("/predictions/small", json=body).json() == expected
    envelope = {"instances": [body, body]}
    assert server.client.post("/predictions/small", json=envelope).json() == {"predictions": 2 * [expected]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "the body is not an image"),
        ({"data": 3}, "data is not an image"),
        ({"image": B64}, "the body is not an image"),
        ({"data": B64, "top_k": 3}, "the body is not an image"),
        ({"instances": []}, "the body must be"),
        ({"instances": [{"data": [1, 2]}]}, "instances.0.data is not an image"),
        ({"instances": 65 * [B64]}, "at most 64"),
    ],
)
def test_torchserve_refuses_unknown_json_forms(server: Server, body: Any, message: str) -> None:
    reply = server.client.post("/predictions/small", json=body)
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")
    assert message in reply.json()["message"]


def test_torchserve_refuses_deeply_nested_json(server: Server) -> None:
    content = b'{"data": ' * 900 + b"3" + b"}" * 900
    assert post_body(server, content, "application/json", "/predictions/small").status_code == 400


def test_json_may_have_the_most_boxes_that_the_service_can_allow() -> None:
    """The number of commas in JSON is limited before anything is parsed."""
    box_lists = [[[0, 0, 100, 100]] * MAX_BOXES] * (MAX_REQUEST_IMAGES // MAX_BOXES)
    body = {"images": [{"b64": "QUJD", "boxes": boxes} for boxes in box_lists]}
    content = json.dumps(body).encode()
    parsed_body = parse_json_body(content, len(content), b"application/json")
    assert sum(len(boxes or ()) for boxes in parsed_body.boxes) == MAX_REQUEST_IMAGES
