"""Forms: a body with a boundary gives images that lie in it, or an error."""

from __future__ import annotations

from typing import Final

from fovea.service.api.forms import parse_form
from fovea.service.errors import RequestError
from fovea.service.settings import MAX_REQUEST_IMAGES
from tests.fuzz.target import Target, require

_BOUNDARY: Final = b"multipart/form-data; boundary=b\n"


def check_form(data: bytes) -> bool:
    """Parse a form; the first line of the input is the content type."""
    content_type, _, body = data.partition(b"\n")
    try:
        parsed = parse_form(body, len(body), content_type)
    except RequestError as error:
        require(len(str(error).encode()) < 2000, "the error quotes the form")
        return False
    require(0 < len(parsed.images) <= MAX_REQUEST_IMAGES, f"the form has {len(parsed.images)} images")
    for image in parsed.images:
        require(isinstance(image, bytes | memoryview), "an image has another type")
        content = bytes(image) if isinstance(image, bytes | memoryview) else b""
        is_decoded = isinstance(image, bytes)  # from base64
        require(is_decoded or content in body, "an image is not in the form")
        require(len(content) <= len(body), "an image is larger than the form")
    return True


def _make_seeds() -> list[bytes]:
    file = b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n'
    field = b'Content-Disposition: form-data; name="%b"\r\n'
    first = _BOUNDARY + b"--b\r\n" + file + b"\r\n\xff\xd8\xff\xe0\r\n--b"
    encoded = file + b"Content-Transfer-Encoding: base64\r\n"
    return [
        first + b"--\r\n",
        first + b"\r\n" + file + b"\r\n\r\n--b--",
        first + b"\r\n" + field % b"top_k" + b"\r\n3\r\n--b\r\n" + field % b"threshold" + b"\r\n0.5\r\n--b--",
        first + b"\r\n" + field % b"boxes" + b"\r\n[[0,0,5,5]]\r\n--b--",
        _BOUNDARY + b"--b\r\n" + encoded + b"\r\n/9j/4A==\r\n--b--",
        _BOUNDARY
        + b"preamble\r\n--b  \r\n"
        + field % b"image"
        + b"\r\n\xff\xd8\xff\xe0\0\x10\r\n--b--\r\nepilogue",
        b'multipart/form-data; charset=utf-8; boundary="a b"\n--a b\r\n' + file + b"\r\nx\r\n--a b--",
    ]


TARGET = Target(
    check_form,
    _make_seeds,
    words=(
        b"\r\n", b"\n", b"--", b"--b", b"\r\n--b\r\n", b"\r\n--b--", b"\r\n\r\n",
        b"Content-Disposition: form-data",
        b"Content-Type: ", b"Content-Transfer-Encoding: base64\r\n", b'; name="', b'; filename="',
        b"; filename*=UTF-8''",
        b"boundary=", b"; boundary=", b"%C3%A9", b"top_k", b"threshold", b"coverage", b"boxes",
        b"embedding", b"nan",
        b"application/octet-stream", b"text/plain", b"\x00", b'"', b"\\",
    ),
    max_size=2000,
)  # fmt: skip
