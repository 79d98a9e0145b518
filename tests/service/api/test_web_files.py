"""The files of the page and of `/docs`: compressed, and immutable under the version of their folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fovea.service.api.page_modules import list_modules
from fovea.service.api.web_files import IMMUTABLE, REVALIDATE, WebFiles
from tests.servers import ROOT, Server

WEB = ROOT / "service" / "web"


def read_links(html: str) -> list[str]:
    """Return the links of an HTML page to its own files."""
    return re.findall(r'(?:href|src|data-photo)="\./([^"]+\.\w+)"', html)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_every_file_of_a_page_is_immutable_and_the_page_is_not(server: Server, path: str) -> None:
    reply = server.client.get(path)
    assert reply.headers["cache-control"] == REVALIDATE
    assert server.client.get(path, headers={"If-None-Match": reply.headers["etag"]}).status_code == 304
    links = [link for link in read_links(reply.text) if path == "/" or link.startswith("docs/")]
    assert links
    for link in links:
        file_reply = server.client.get(f"/{link}")
        assert file_reply.status_code == 200, link
        assert file_reply.headers["cache-control"] == IMMUTABLE, link
        plain_link = re.sub(r"/v-\w+/", "/", link)
        plain_reply = server.client.get(f"/{plain_link}")
        assert plain_reply.content == file_reply.content
        assert plain_reply.headers["cache-control"] == REVALIDATE


def test_file_under_the_version_of_another_replica_is_revalidated(server: Server) -> None:
    reply = server.client.get("/page/v-0123456789ab/main.js")
    assert reply.headers["cache-control"] == REVALIDATE
    assert reply.content == (WEB / "page" / "main.js").read_bytes()
    assert server.client.get("/page/v-0123456789ab/none.js").status_code == 404
    assert server.client.get("/page/v-0123456789ab/").status_code == 404
    assert server.client.get("/page/v-0123456789ab/../../app.py").status_code == 404


@pytest.mark.parametrize(
    "path", ["/page/main.js", "/page/base.css", "/docs/swagger/swagger-ui-bundle.js", "/", "/docs"]
)
def test_text_is_compressed_for_those_who_take_gzip(server: Server, path: str) -> None:
    plain_reply = server.client.get(path, headers={"Accept-Encoding": "identity"})
    reply = server.client.get(path, headers={"Accept-Encoding": "br, gzip"})
    assert reply.headers["vary"] == plain_reply.headers["vary"] == "Accept-Encoding"
    assert reply.content == plain_reply.content
    assert "content-encoding" not in plain_reply.headers
    if len(reply.content) >= 1024:
        assert reply.headers["content-encoding"] == "gzip"
        assert reply.num_bytes_downloaded < 0.55 * len(reply.content)
    for tag in (reply.headers["etag"], plain_reply.headers["etag"]):
        assert server.client.get(path, headers={"If-None-Match": tag}).status_code == 304


def test_images_are_not_compressed(server: Server) -> None:
    reply = server.client.get("/page/samples/ship.jpg")
    assert "content-encoding" not in reply.headers
    assert "vary" not in reply.headers


def test_page_preloads_every_module_and_those_that_it_starts_with_first(server: Server) -> None:
    html = server.client.get("/").text
    preloads = re.findall(
        r'<link rel="modulepreload"( fetchpriority="low")? href="\./page/v-\w+/([^"]+)"', html
    )
    files = {path.relative_to(WEB / "page").as_posix() for path in (WEB / "page").rglob("*.js")}
    on_demand = {file for file in files if file.startswith(("article/", "compare/", "growth/", "table/"))}
    on_demand.remove("article/loader.js")
    assert len(on_demand) > 5
    assert {module for _, module in preloads} == files - {"theme.js", "early.js"} - on_demand
    first = [module for is_low, module in preloads if not is_low]
    assert first[0] == "main.js"
    assert {module for _, module in preloads[: len(first)]} == set(first)
    assert "api.js" in first
    assert "layers.js" not in first


def test_modules_are_found_through_all_kinds_of_imports(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    sources = {
        "main.js": '/** {import("./note.js").N} */\nimport { a,\n b } from "./a.js";\n// import "./no.js";\n',
        "a.js": 'import "./parts/b.js";\nexport { c } from "./c.js";\nconst later = import("./later.js");\n',
        "parts/b.js": 'import * as main from "../main.js";\n',
        "c.js": "",
        "later.js": 'import { c } from "./c.js";\nimport "./last.js";\n',
        "last.js": "",
        "note.js": "",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    assert list_modules(tmp_path, "main.js") == (["a.js", "parts/b.js", "c.js"], ["later.js", "last.js"])


def test_changed_file_has_another_version(tmp_path: Path) -> None:
    """A developer reloads the page and sees the change."""
    folder = tmp_path / "page"
    shutil.copytree(WEB / "page", folder)
    files = WebFiles(folder, {}, {})
    app = FastAPI()
    app.mount("/page", files)

    def fetch(version: str) -> tuple[str, str]:
        """Return the file and its `Cache-Control`."""
        reply = client.get(f"/page/{version}/main.js")
        return reply.text, reply.headers["cache-control"]

    with TestClient(app) as client:
        first_version = files.read_version()
        assert WebFiles(WEB / "page", {}, {}).read_version() == first_version
        assert fetch(first_version) == ((folder / "main.js").read_text(), IMMUTABLE)
        new_source = "// " + 2000 * "new "
        (folder / "main.js").write_text(new_source)
        second_version = files.read_version()
        assert second_version != first_version
        assert fetch(second_version) == (new_source, IMMUTABLE)
        assert fetch(first_version) == (new_source, REVALIDATE)
