"""The web page at `/` and its files.

They load nothing from other sites, and the headers make the browser enforce this.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import Response

from fovea.service.api.page_modules import list_modules
from fovea.service.api.web_files import REVALIDATE, WebFiles
from fovea.service.http.compression import VARY, Compressor
from fovea.service.http.request_context import get_request_origin

PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=(), payment=(), usb=()",
}

FILE_HEADERS: Final = {
    name: PAGE_HEADERS[name] for name in ("X-Content-Type-Options", "Cross-Origin-Resource-Policy")
}
"""Headers of scripts, style sheets and images, which have no policy of their own: the policy of the page that
loads them counts. On a slow line the others would take a quarter of the time."""

DOCS_HEADERS: Final = {
    **PAGE_HEADERS,
    # Swagger UI writes styles into its elements, and has images in its style sheet.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
"""Headers of Swagger UI."""

_MAIN: Final = "main.js"
"""Module with which the page starts."""

_MODELS_PRELOAD: Final = '<link rel="preload" as="fetch" crossorigin="anonymous" href="./v1/models">'
"""Link by which the browser asks for the list of models before the modules that need it have arrived."""

_ON_DEMAND: Final = ("article/", "compare/", "growth/", "table/")
"""Folders of the modules that the page loads only when somebody opens what they show."""

_HIDDEN_KEY_BUTTON: Final = 'id="change-key" hidden'
"""Attributes in `index.html` of the button that replaces the key."""

_HIDDEN_ADDRESS: Final = 'id="address" class="ways" hidden'
"""Attributes in `index.html` of the form that takes the address of a picture."""

_MODULES_MARK: Final = "<!-- modules -->"
"""Place in `index.html` for the links to the modules."""


def add_routes(app: FastAPI, folder: Path, *, needs_key: bool, fetches_urls: bool) -> None:
    """Serve `folder`: `index.html` at `/`, and the folder `page/` at `/page/`.

    The page lets the browser ask for the list of models in advance, unless the service needs a key for it.
    If the service needs keys, the page has a button that replaces the key. If the service fetches images by
    URL, the page has a form for the address of a picture.
    """
    preload = "" if needs_key else _MODELS_PRELOAD
    shown = [_HIDDEN_KEY_BUTTON] * needs_key + [_HIDDEN_ADDRESS] * fetches_urls
    files = WebFiles(folder / "page", FILE_HEADERS, PAGE_HEADERS)
    compressor = Compressor()
    app.mount("/page", files)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        version = await asyncio.to_thread(files.read_version)
        text = (folder / "index.html").read_text()
        text = text.replace(_MODULES_MARK, _link_modules(folder / "page", version, preload))
        for attributes in shown:
            text = text.replace(attributes, attributes.removesuffix(" hidden"))
        text = text.replace('="./page/', f'="./page/{version}/')
        return await render_page(request, text, PAGE_HEADERS, compressor, root=".")


@lru_cache(maxsize=1)
def _link_modules(folder: Path, version: str, preload: str) -> str:
    """Return the links that load the modules of the page at once, first those with which the page starts.

    Then comes `preload`, and the modules that the page loads afterwards.
    `version` is the version of the folder, which has other modules when it changes.
    """
    first, later = list_modules(folder, _MAIN)
    return "\n    ".join(
        [
            *(f'<link rel="modulepreload" href="./page/{escape(module)}">' for module in (_MAIN, *first)),
            preload,
            *(
                f'<link rel="modulepreload" fetchpriority="low" href="./page/{escape(module)}">'
                for module in later
                if not module.startswith(_ON_DEMAND)
            ),
        ]
    )


async def render_page(
    request: Request, text: str, headers: Mapping[str, str], compressor: Compressor, *, root: str
) -> Response:
    """Return an HTML page in which links that begin with `./` start at the root of the service.

    A browser resolves links against the address that it requested, from which a proxy may have removed a
    prefix. `root` is the root if no proxy says that it has. The browser revalidates the page on each use.
    """
    root = get_request_origin(request.scope).prefix or root
    content = text.replace('="./', f'="{escape(root)}/').encode()
    # Weak, because both forms of the page have this tag (RFC 9110, section 8.8.3.3).
    tag = f'W/"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {**headers, "Cache-Control": REVALIDATE, "ETag": tag}
    if tag in (one.strip() for one in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers={**headers, "Vary": VARY})
    return await compressor.create_response(request.scope, content, "text/html", headers)
