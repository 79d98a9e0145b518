"""Files of the pages: compressed once, and with names that never change their content.

The page and its modules link to each other by relative URLs. A folder of files therefore has one version, a
digest of all of them, as the first segment of their paths: `/page/v-0123456789ab/main.js`. Such a file never
changes, so that browsers keep it without a question. The same file without a version, or with the version of
another replica during a rollout, is the current file, which browsers revalidate.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from fovea.service.http.compression import MIN_BYTES, VARY, compress_content, request_accepts_gzip

REVALIDATE: Final = "no-cache"
"""`Cache-Control` of files whose content can change: revalidate the ETag on each use."""

IMMUTABLE: Final = "public, max-age=31536000, immutable"
"""`Cache-Control` of files with a version in their path: a year, the longest time that caches heed."""

_VERSION: Final = re.compile(r"v-[0-9a-f]{12}")

_TEXT_SUFFIXES: Final = frozenset({".css", ".html", ".js", ".json", ".svg"})
"""Files that are compressed. The other ones are images, which are compressed already."""

_Signature = tuple[str, int, int]
"""Path, time of the last change in ns and size of a file: a file that changes gets another one."""


_DOCUMENT_SUFFIXES: Final = frozenset({".html", ".svg"})
"""Files that a browser can open as a page of its own, which can have scripts."""


class WebFiles(StaticFiles):
    """The files of a folder."""

    def __init__(self, folder: Path, headers: Mapping[str, str], document_headers: Mapping[str, str]) -> None:
        """Serve `folder` with `headers`. Files that can be pages of their own have `document_headers`."""
        super().__init__(directory=folder)
        self._folder = folder
        self._headers = headers
        self._document_headers = document_headers
        self._compressed_files: dict[_Signature, bytes] = {}
        self._version: tuple[list[_Signature], str] = ([], "")
        """The version of the files, and their signatures."""

    def read_version(self) -> str:
        """Return the version of the folder's files as they are now, a segment of a URL.

        A developer who changes a file gets another version, without a restart. Takes a millisecond; threads
        may call this at the same time.
        """
        paths = sorted(path for path in self._folder.rglob("*") if path.is_file())
        signatures = [_sign_file(path, path.stat()) for path in paths]
        if signatures != self._version[0]:
            digest = hashlib.blake2b(digest_size=6)
            for path in paths:
                name, content = path.relative_to(self._folder).as_posix().encode(), path.read_bytes()
                digest.update(b"%d %b%d " % (len(name), name, len(content)))
                digest.update(content)
            self._version = signatures, f"v-{digest.hexdigest()}"
        return self._version[1]

    async def get_response(self, path: str, scope: Scope) -> Response:
        version, _, rest = path.partition(os.sep)
        is_current = False
        if _VERSION.fullmatch(version):
            path = rest or "."
            is_current = version == (self._version[1] or await asyncio.to_thread(self.read_version))
        response = await super().get_response(path, scope)
        suffix = Path(path).suffix
        response.headers.update(self._document_headers if suffix in _DOCUMENT_SUFFIXES else self._headers)
        response.headers["Cache-Control"] = IMMUTABLE if is_current else REVALIDATE
        if suffix not in _TEXT_SUFFIXES:
            return response
        response.headers["Vary"] = VARY
        if (
            not isinstance(response, FileResponse)
            or any(name.lower() == b"range" for name, _ in scope["headers"])
            or not request_accepts_gzip(scope)
        ):
            return response
        return await self._compress(response)

    async def _compress(self, response: FileResponse) -> Response:
        """Return the response with the file as gzip. A file is compressed at its first request."""
        path = Path(response.path)
        status = path.stat()
        if status.st_size < MIN_BYTES:
            return response
        signature = _sign_file(path, status)
        content = self._compressed_files.get(signature)
        if content is None:
            content = await compress_content(path.read_bytes())
            self._compressed_files[signature] = content
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("accept-ranges", "content-length", "content-type")
        }
        # Weak, because both forms of the file have this tag (RFC 9110, section 8.8.3.3).
        headers |= {"etag": f"W/{response.headers['etag']}", "content-encoding": "gzip"}
        return Response(content, media_type=response.media_type, headers=headers)


def _sign_file(path: Path, status: os.stat_result) -> _Signature:
    return str(path), status.st_mtime_ns, status.st_size
