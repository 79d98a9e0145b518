"""Classify a small image by every model of the service at HOST PORT; `helm test` runs this file."""

import http.client
import json
import struct
import sys
import urllib.parse
import zlib


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


def call(host: str, port: int, method: str, path: str, body: bytes | None = None) -> dict:
    """Return the JSON of a reply; end the program if the status is not 200."""
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.request(method, path, body, {"Content-Type": "image/png"} if body else {})
    reply = connection.getresponse()
    text = reply.read()
    if reply.status != 200:
        sys.exit(f"{method} {path}: {reply.status} {text[:500]!r}")
    return json.loads(text)


def main(host: str, port: int) -> None:
    """Print the label that each model gives."""
    models = call(host, port, "GET", "/v1/models")["models"]
    if not models:
        sys.exit("the service has no model")
    for model in models:
        path = f"/v1/models/{urllib.parse.quote(model['name'])}/classify"
        reply = call(host, port, "POST", path, make_png(64, 48))
        print(f"{model['name']}: {json.dumps(reply)[:200]}")


main(sys.argv[1], int(sys.argv[2]))
