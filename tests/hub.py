"""A stub of the Hugging Face hub: repositories with commits, private and gated ones, and cut downloads.

`huggingface_hub` reads the address of the hub when it is imported, so the tests run commands in a process of
their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from tests.servers import ROOT

TOKEN = "hf_token_of_the_tests"


@dataclass
class HubRepository:
    """A repository on the stub."""

    folder: Path
    """Files of the only commit."""
    commit: str = "1" * 40
    access: Literal["public", "private", "gated"] = "public"
    """Private repositories need the token; the files of gated ones are refused even with it."""
    pipeline_tag: str | None = "image-classification"
    wrong_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the list of files states instead of the real ones."""


@dataclass
class HubStub:
    """The stub's repositories and the requests that it has received."""

    repositories: dict[str, HubRepository]
    address: str = ""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    cut_files: set[str] = field(default_factory=set)
    """Files whose next download is cut in the middle."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" if is_api else "").strip("/").split("/")
        repository = self.hub.repositories.get("/".join(parts[:2]))
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.access == "private" and not has_token):
            return self._refuse(401, "RepoNotFound")
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            return self._send(
                200, json.dumps(self._describe("/".join(parts[:2]), repository)).encode(), {}, True
            )
        if repository.access == "gated":
            return self._refuse(403, "GatedRepo")
        return self._send_file(repository, "/".join(parts[4:]), has_body=has_body)

    def _describe(self, name: str, repository: HubRepository) -> dict[str, Any]:
        files = sorted(one for one in repository.folder.rglob("*") if one.is_file())
        names = {one.relative_to(repository.folder).as_posix(): one.stat().st_size for one in files}
        return {
            "id": name,
            "sha": repository.commit,
            "private": repository.access == "private",
            "gated": "manual" if repository.access == "gated" else False,
            "pipeline_tag": repository.pipeline_tag,
            "tags": [],
            "siblings": [
                {"rfilename": one, "size": repository.wrong_sizes.get(one, size)}
                for one, size in names.items()
            ],
        }

    def _send_file(self, repository: HubRepository, name: str, *, has_body: bool) -> None:
        file = repository.folder / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        content = file.read_bytes()
        headers = {
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        first = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        start = int(first or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if has_body and name in self.hub.cut_files:
            self.hub.cut_files.remove(name)
            self.close_connection = True
            return self._send(200, content[: len(content) // 2], headers, True, length=len(content))
        return self._send(206 if start else 200, content[start:], headers, has_body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code}, False)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], has_body: bool, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if has_body:
            self.wfile.write(content)


@contextmanager
def run_hub(**repositories: HubRepository) -> Iterator[HubStub]:
    """Serve the repositories; in their names, two underscores stand for the slash."""
    hub = HubStub({name.replace("__", "/"): one for name, one in repositories.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class CommandResult:
    """The end of one command."""

    code: int
    output: str
    error: str

    @property
    def error_line(self) -> str:
        """The only line on stderr."""
        assert (self.code, self.error.count("\n")) == (2, 1), self
        assert self.error.startswith("fovea: "), self
        return self.error.removeprefix("fovea: ").strip()


_SCRIPT = """
import contextlib, io, json, sys
from fovea import cli

for line in sys.argv[1:]:
    sys.argv = ["fovea", *json.loads(line)]
    code, output, error = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([code, output.getvalue(), error.getvalue()]), file=sys.__stdout__)
"""


def run_commands(
    folder: Path, address: str, *commands: Sequence[object], **variables: str
) -> list[CommandResult]:
    """Run `fovea` commands one after the other in one process, with an empty home below `folder`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TMPDIR": str(folder / "tmp"),
        "FOVEA_MODELS": str(folder / "zoo"),
        **variables,
    }
    (folder / "tmp").mkdir(exist_ok=True)
    lines = [json.dumps([str(word) for word in command]) for command in commands]
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *lines],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert list((folder / "tmp").glob("fovea-*")) == []
    return [CommandResult(*json.loads(line)) for line in result.stdout.splitlines()]
