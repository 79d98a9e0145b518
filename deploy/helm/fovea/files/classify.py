"""Classify a small image by every model of the service at HOST PORT; `helm test` runs this file.

A third argument is a file with the certificate of the service: the program talks to nobody with another
certificate. A fourth is a folder with the program's own certificate, `tls.crt` and `tls.key`. FOVEA_KEY is
an API key.
"""

import http.client
import json
import os
import ssl
import struct
import sys
import urllib.parse
import zlib
from pathlib import Path

KEY = os.environ.get("FOVEA_KEY", "").strip()

LAST_LINE = "-----END CERTIFICATE-----"


def make_png(width: int, height: int) -> bytes:
    """Return a PNG with a gradient."""
    rows = b"".join(b"\0" + bytes((x * 8 % 256, y * 8 % 256, 128)[c] for x in range(width) for c in range(3))
                    for y in range(height))  # fmt: skip
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b""))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


class Service:
    """The service under test."""

    def __init__(self, host: str, port: int, certificate: str = "", client: str = "") -> None:
        self._address = (host, port)
        self._tls: ssl.SSLContext | None = None
        if certificate:
            # The certificate may lack the name of this Service. Others in the file are of authorities.
            first = Path(certificate).read_text().partition(LAST_LINE)[0] + LAST_LINE
            self._tls = ssl.create_default_context(cadata=first)
            self._tls.check_hostname = False
            self._tls.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN
        if self._tls and client:
            self._tls.load_cert_chain(f"{client}/tls.crt", f"{client}/tls.key")

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return the status and the body of a reply."""
        connection = http.client.HTTPConnection(*self._address, timeout=20)
        if self._tls:
            connection = http.client.HTTPSConnection(*self._address, timeout=20, context=self._tls)
        headers = {"Content-Type": "image/png"} if body else {}
        if KEY:
            headers["Authorization"] = f"Bearer {KEY}"
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def fetch(self, method: str, path: str, body: bytes | None = None) -> dict:
        """Return the JSON of a reply; end the program if the status is not 200."""
        status, text = self.call(method, path, body)
        if status != 200:
            sys.exit(f"{method} {path}: {status} {text[:500]!r}")
        return json.loads(text)


def main(host: str, port: str, certificate: str = "", client: str = "") -> None:
    """Print the label that each model gives."""
    service = Service(host, int(port), certificate, client)
    service.fetch("GET", "/health/ready")
    status, text = service.call("GET", "/v1/models")
    if (status == 401 and not KEY) or (status == 403 and not client and b"certificate_required" in text):
        print(
            f"the service is ready and refuses callers without a key or certificate: {status}; "
            "nothing was classified"
        )
        return
    models = service.fetch("GET", "/v1/models")["models"]
    if not models:
        sys.exit("the service has no model")
    for model in models:
        path = f"/v1/models/{urllib.parse.quote(model['name'])}/classify"
        reply = service.fetch("POST", path, make_png(64, 48))
        print(f"{model['name']}: {json.dumps(reply)[:200]}")


main(*sys.argv[1:])
