"""Good images in unusual forms and base64, as other tools write them, in every protocol."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server
from tests.service.api.test_protocols import ASKED, error_code

CLASSIFY = "/v1/classify"
TENSORFLOW = "/v1/models/small:predict"
IMAGE = make_jpeg()
FORM = "multipart/form-data; boundary=x"
END = b"\r\n--x--\r\n"


def form_part(content: bytes, *headers: bytes) -> bytes:
    """One part of a form, with the delimiter before it."""
    return b"--x\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + content


def post_body(server: Server, content: bytes, content_type: str, path: str = CLASSIFY) -> httpx.Response:
    return server.client.post(path, content=content, headers={"Content-Type": content_type})


@pytest.fixture(scope="module")
def wanted(server: Server) -> Any:
    """The reply to the raw image."""
    return server.client.post(CLASSIFY, content=IMAGE).json()


# --- forms ---------------------------------------------------------------------------------------

NAMED = b'Content-Disposition: form-data; name="f"'
FILE = NAMED + b'; filename="a.jpg"'

FORMS: dict[str, tuple[bytes, str]] = {
    "an image type and no file name": (form_part(IMAGE, NAMED, b"Content-Type: image/jpeg") + END, FORM),
    "an image type and no name at all": (form_part(IMAGE, b"content-type: Image/JPEG") + END, FORM),
    "bytes of no type and no file name": (
        form_part(IMAGE, NAMED, b"Content-Type: application/octet-stream") + END,
        FORM,
    ),
    "neither type nor file name": (form_part(IMAGE, NAMED) + END, FORM),
    "a preamble": (b"This is a multipart message.\r\n" + form_part(IMAGE, FILE) + END, FORM),
    "a preamble of several lines": (
        b"\r\nOne -- two\r\n- three.\r\n\r\n" + form_part(IMAGE, FILE) + END,
        FORM,
    ),
    "an epilogue": (form_part(IMAGE, FILE) + END + b"This was it.\r\n--x\r\n", FORM),
    "blanks behind the delimiters": (
        form_part(b"hello\r\n", NAMED).replace(b"--x", b"--x \t")
        + form_part(IMAGE, FILE).replace(b"--x", b"--x  ")
        + END[:-2]
        + b" \r\n",
        FORM,
    ),
    "a quoted boundary": (form_part(IMAGE, FILE) + END, 'multipart/form-data; boundary="x"'),
    "another case": (form_part(IMAGE, FILE) + END, "Multipart/Form-Data; charset=utf-8; BOUNDARY=x"),
    "a quoted boundary with blanks": (
        b"--a b: c\r\n" + FILE + b"\r\n\r\n" + IMAGE + b"\r\n--a b: c--",
        'multipart/form-data;boundary="a b: c"',
    ),
    "an extended file name in capitals": (
        form_part(IMAGE, NAMED + b"; FileName* = UTF-8''caf%C3%A9.jpg") + END,
        FORM,
    ),
    "base64 in lines": (
        form_part(base64.encodebytes(IMAGE), FILE, b"Content-Transfer-Encoding: BASE64") + END,
        FORM,
    ),
    "a transfer encoding that changes nothing": (
        form_part(IMAGE, FILE, b"Content-Transfer-Encoding: binary") + END,
        FORM,
    ),
    "text fields beside it": (
        form_part(b"hello\r\n", NAMED)
        + form_part("café\r\n".encode(), NAMED)
        + form_part(b"caf\xe9\r\n", NAMED)
        + form_part(IMAGE, FILE)
        + END,
        FORM,
    ),
}


@pytest.mark.parametrize("how", FORMS)
def test_a_form_is_read_however_it_is_written(server: Server, wanted: Any, how: str) -> None:
    content, content_type = FORMS[how]
    assert post_body(server, content, content_type).json() == wanted
    chunked = server.client.post(CLASSIFY, content=iter([content]), headers={"Content-Type": content_type})
    assert chunked.json() == wanted


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG"])
def test_every_format_is_known_in_a_part_that_says_nothing(server: Server, kind: str) -> None:
    content = encode_image(draw_picture(300, 200), kind)
    reply = post_body(server, form_part(content, NAMED) + END, FORM)
    assert reply.json() == server.client.post(CLASSIFY, content=content).json()


def test_several_images_without_file_names_are_all_answered(server: Server, wanted: Any) -> None:
    parts = (
        form_part(IMAGE, NAMED, b"Content-Type: image/jpeg") + b"\r\n" + form_part(IMAGE, FILE) + b"\r\n"
        + form_part(IMAGE, NAMED) + END
    )  # fmt: skip
    results = post_body(server, b"preamble\r\n" + parts, FORM).json()["results"]
    assert [one["predictions"] for one in results] == 3 * [wanted["predictions"]]


def test_a_large_form_with_a_preamble_keeps_its_places(server: Server) -> None:
    """The form is in the memory that the runners share."""
    large = encode_image(draw_picture(400, 300), "BMP")
    assert len(large) > 256 << 10
    reply = post_body(server, b"preamble\r\n" + form_part(large, FILE) + END, FORM)
    assert reply.json() == server.client.post(CLASSIFY, content=large).json()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (form_part(IMAGE, FILE, b"Content-Transfer-Encoding: quoted-printable") + END, "'quoted-printable'"),
        (form_part(b"@@@@", FILE, b"Content-Transfer-Encoding: base64") + END, "file 0 is not base64"),
        (form_part(b"hello", NAMED) + END, "has no file"),
        (b"no delimiter", "malformed"),
    ],
)
def test_a_form_that_cannot_be_read_says_why(server: Server, content: bytes, said: str) -> None:
    reply = post_body(server, content, FORM)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert said in reply.json()["error"]["message"]


# --- options -------------------------------------------------------------------------------------


def test_a_form_s_fields_may_be_options(server: Server, wanted: Any) -> None:
    files = {"file": IMAGE}
    reply = server.client.post(f"{CLASSIFY}?top_k=3", files=files, data={"top_k": "1", "note": "hello"})
    assert reply.json()["predictions"] == wanted["predictions"][:1]
    reply = server.client.post(CLASSIFY, files=files, data={"coverage": "0.9"})
    assert reply.json()["coverage"]["level"] == 0.9


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("topk", "3", "did you mean top_k?"),
        ("Top-K", "3", "did you mean top_k?"),
        ("treshold", "0.5", "did you mean threshold?"),
        ("top_k", "many", "top_k: "),
        ("top_k", ["1", "2"], "top_k twice"),
    ],
)
def test_an_option_in_a_form_is_never_ignored(server: Server, field: str, value: Any, said: str) -> None:
    reply = server.client.post(CLASSIFY, files={"file": IMAGE}, data={field: value})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("topk=3", "did you mean top_k?"),
        ("TOP_K=3", "did you mean top_k?"),
        ("colour=red", "there are top_k, threshold, coverage, timing"),
        ("top_k=3&top_k=5", "'top_k' twice"),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_query_is_never_ignored(server: Server, query: str, said: str, is_chunked: bool) -> None:
    content: Any = iter([IMAGE]) if is_chunked else IMAGE
    reply = server.client.post(f"{CLASSIFY}?{query}", content=content)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize("protocol", ["oip", "torchserve", "tensorflow", "huggingface"])
def test_our_options_are_refused_where_another_protocol_would_ignore_them(
    server: Server, protocol: str
) -> None:
    path, body = ASKED[protocol]
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    url = path.format("small")
    reply = server.client.post(f"{url}?top_k=2", **content)
    assert (reply.status_code, error_code(reply, protocol)) == (400, "bad_request")
    assert "top_k" in reply.text
    assert server.client.post(f"{url}?key=of-a-gateway", **content).status_code == 200


def test_an_explanation_minds_the_options_of_its_body(server: Server) -> None:
    asked = {"images": [{"b64": base64.b64encode(IMAGE).decode()}], "top_k": 2}
    assert len(server.client.post("/v1/explain", json=asked).json()["predictions"]) == 2
    reply = server.client.post("/v1/explain", json={**asked, "threshold": 0.5})
    assert (reply.status_code, "threshold" in reply.text) == (400, True)
    reply = server.client.post("/explanations/small?top_k=2", content=IMAGE)
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")
    reply = server.client.post("/explanations/small", files={"data": IMAGE}, data={"top_k": "2"})
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")


# --- base64 --------------------------------------------------------------------------------------

PADDED = next(make_jpeg(seed=seed) for seed in range(100) if len(make_jpeg(seed=seed)) % 3 == 1)
"""An image whose base64 ends in two characters of padding."""

B64 = base64.b64encode(PADDED).decode()
IN_URLS = base64.urlsafe_b64encode(PADDED).decode()

WRITTEN = {
    "as it is": B64,
    "without padding": B64.rstrip("="),
    "with half of its padding": B64[:-1],
    "in the alphabet of URLs": IN_URLS,
    "in the alphabet of URLs, without padding": IN_URLS.rstrip("="),
    "in lines": "\r\n".join(B64[start : start + 76] for start in range(0, len(B64), 76)),
    "indented": "\n    ".join(["", *(B64[start : start + 64] for start in range(0, len(B64), 64)), ""]),
    "with blanks": " ".join(B64[start : start + 10] for start in range(0, len(B64), 10)),
    "a data URI": f"data:image/jpeg;base64,{B64}",
    "a data URI without a type": f"data:;base64,{B64}",
    "a data URI with parameters": f"data:image/jpeg;charset=utf-8;base64,{B64}",
    "a data URI in capitals": f"DATA:image/JPEG;BASE64,{B64}",
    "a data URI of another type": f"data:application/octet-stream;base64,{B64.rstrip('=')}",
    "a data URI in another alphabet": f"data:image/jpeg;base64,{IN_URLS}",
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


@pytest.mark.parametrize("where", BODIES)
def test_base64_is_read_however_it_is_written(server: Server, where: str) -> None:
    path, body = BODIES[where]
    expected = server.client.post(path, json=body(B64)).json()
    for how, text in WRITTEN.items():
        reply = server.client.post(path, json=body(text))
        assert (reply.status_code, reply.json()) == (200, expected), how


@pytest.mark.parametrize("where", BODIES)
def test_what_is_no_base64_is_refused(server: Server, where: str) -> None:
    path, body = BODIES[where]
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


@pytest.mark.parametrize("where", BODIES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_may_come_from_windows(server: Server, where: str, encoding: str) -> None:
    path, body = BODIES[where]
    expected = server.client.post(path, json=body(B64)).json()
    content = json.dumps(body(B64)).encode(encoding)
    for content_type in ("application/json", f"Application/JSON; charset={encoding}", "text/json"):
        reply = post_body(server, content, content_type, path)
        assert (reply.status_code, reply.json()) == (200, expected)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"\xef\xbb\xbf", b'{\0"\0\0\xd8', b"\0\0\0", b"[\0"])
def test_broken_encodings_of_json_are_malformed(server: Server, content: bytes) -> None:
    for protocol, path in (("native", CLASSIFY), ("huggingface", "/predict"), ("tensorflow", TENSORFLOW)):
        reply = post_body(server, content, "application/json", path)
        assert (reply.status_code, error_code(reply, protocol)) == (400, "bad_request")


# --- TorchServe's JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [B64, {"data": B64}, {"body": B64}, {"data": {"b64": B64}}], ids=["text", "data", "body", "b64"]
)
def test_torchserve_takes_json_as_its_handlers_do(server: Server, body: Any) -> None:
    expected = server.client.post("/predictions/small", content=PADDED).json()
    assert server.client.post("/predictions/small", json=body).json() == expected
    envelope = {"instances": [body, body]}
    assert server.client.post("/predictions/small", json=envelope).json() == {"predictions": 2 * [expected]}


@pytest.mark.parametrize(
    ("body", "said"),
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
def test_torchserve_s_json_that_is_none_of_its_own(server: Server, body: Any, said: str) -> None:
    reply = server.client.post("/predictions/small", json=body)
    assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")
    assert said in reply.json()["message"]


def test_torchserve_s_json_that_is_nested_too_deep(server: Server) -> None:
    content = b'{"data": ' * 900 + b"3" + b"}" * 900
    assert post_body(server, content, "application/json", "/predictions/small").status_code == 400
