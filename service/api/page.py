"""The web page at `/` and its files.

They load nothing from other sites, and the headers make the browser enforce this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from fovea.service.http.paths import relative_root_url
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
    "Cache-Control": "no-cache",  # revalidate the ETag on each use
}

DOCS_HEADERS: Final = {
    **PAGE_HEADERS,
    # Swagger UI writes styles into its elements, and has images in its style sheet.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
"""Headers of Swagger UI."""


_NO_HEADERS: Final[Mapping[str, str]] = {}


class PageFiles(StaticFiles):
    """A folder of files that are sent with `PAGE_HEADERS`."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(PAGE_HEADERS)
        return response


def add_routes(app: FastAPI, folder: Path) -> None:
    """Serve `folder`: `index.html` at `/`, and the folder `page/` at `/page/`."""
    files = PageFiles(directory=folder)
    app.mount("/page", PageFiles(directory=folder / "page"))

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        if get_request_origin(request.scope).prefix:
            return render_page(request, folder / "index.html", PAGE_HEADERS)
        return await files.get_response("index.html", request.scope)


def render_page(request: Request, file: Path, headers: Mapping[str, str] = _NO_HEADERS) -> Response:
    """Return an HTML file in which links that begin with `./` start at the root of the service.

    A browser resolves links against the address that it requested, from which a proxy may have removed a
    prefix.
    """
    root = get_request_origin(request.scope).prefix or relative_root_url(request.scope["raw_path"])
    content = file.read_text().replace('="./', f'="{root}/')
    return HTMLResponse(content, headers=dict(headers))
