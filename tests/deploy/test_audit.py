"""The audit of locked packages, and the list of their licences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import licences
from tests.servers import ROOT
from tests.tools import SYSTEM_REASON

AUDIT = ROOT / "deploy" / "audit.py"
TOOLS = ROOT / "build" / "audit" / "bin"


@contextmanager
def serve_osv(*vulnerable: str) -> Iterator[str]:
    """Answer as OSV does: these packages have a vulnerability."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = question["package"]["name"]
            advisory = {
                "id": "PYSEC-1",
                "summary": "a test",
                "affected": [],
                "modified": "2026-01-01T00:00:00Z",
            }
            reply: dict[str, Any] = {"vulns": [advisory]} if name in vulnerable else {}
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def run_audit(url: str, *arguments: str, program: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OSV_URL": url, "no_proxy": "*"}
    return subprocess.run(
        [program, AUDIT, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--strict"], 1), (["--only-ask"], 1)])
def test_silent_service_is_not_an_audit(arguments: list[str], status: int) -> None:
    process = run_audit("http://127.0.0.1:9/v1/query", *arguments)
    assert process.stdout.startswith("NOT AUDITED: http://127.0.0.1:9/v1/query does not answer: ")
    assert process.returncode == status


@pytest.mark.parametrize(("variable", "status"), [("AUDIT=", 0), ("AUDIT=--strict", 2)])
def test_make_audit_installs_nothing_without_an_answer(variable: str, status: int) -> None:
    environment = {**os.environ, "OSV_URL": "http://127.0.0.1:9/v1/query", "no_proxy": "*"}
    words = ["make", "--no-print-directory", "audit", variable, f"PYTHON={sys.executable}"]
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout.startswith("NOT AUDITED: ")
    assert process.stdout.count("\n") == 1
    assert process.returncode == status


def test_service_that_knows_nothing_is_not_an_audit() -> None:
    """A mirror or a proxy may answer every question with nothing."""
    with serve_osv() as url:
        process = run_audit(url, "--strict")
    assert process.stdout == f"NOT AUDITED: {url} knows no vulnerability of pip 1.0\n"
    assert process.returncode == 1


@pytest.mark.parametrize(("vulnerable", "status"), [("none", 0), ("certifi", 1)])
def test_vulnerable_package_fails_the_audit(tmp_path: Path, vulnerable: str, status: int) -> None:
    if not (TOOLS / "pip-audit").exists():
        pytest.skip(f"{SYSTEM_REASON}has no pip-audit: make audit installs it")
    lock = tmp_path / "lock.txt"
    text = (ROOT / "deploy" / "image" / "cpu.txt").read_text()
    lock.write_text("\n".join(re.findall(r"^(?:certifi|idna)==(?:.*\\\n)*.*$", text, re.MULTILINE)) + "\n")
    with serve_osv("pip", vulnerable) as url:
        process = run_audit(url, "--strict", str(lock), program=str(TOOLS / "python"))
    assert process.returncode == status, process.stderr
    assert ("PYSEC-1" in process.stdout) == bool(status)


def test_bill_of_materials_has_every_locked_package(tmp_path: Path) -> None:
    if not (TOOLS / "cyclonedx-py").exists():
        pytest.skip(f"{SYSTEM_REASON}has no cyclonedx-py: make sbom installs it")
    line = re.search(r"^SBOM = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    words = [*line[1].split(), "--output-file", str(tmp_path / "bom.json"), "deploy/image/cpu.txt"]
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    document = json.loads((tmp_path / "bom.json").read_text())
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["name"] == "fovea-serve"
    locked = re.findall(r"^(\S+)==(\S+)", (ROOT / "deploy" / "image" / "cpu.txt").read_text(), re.MULTILINE)
    assert [(one["name"], one["version"]) for one in document["components"]] == locked


def test_audited_files_are_all_lock_files() -> None:
    locks = {
        str(path.relative_to(ROOT / "deploy"))
        for path in (ROOT / "deploy").rglob("*.txt")
        if "--hash=" in path.read_text()
    }
    namespace: dict[str, Any] = {"__name__": "audit", "__file__": str(AUDIT)}
    exec(compile(AUDIT.read_text(), AUDIT, "exec"), namespace)  # noqa: S102 - a script of our own
    assert set(namespace["LOCK_FILES"]) == locks


FORBIDDEN = re.compile(r"(?<![A-Z])A?GPL|SSPL|BUSL|unknown|proprietary", re.IGNORECASE)


def test_licences_of_all_packages_are_listed_and_allowed() -> None:
    """A package whose metadata are here must have the licence of the page."""
    page = licences.read_page()
    assert list(page) == licences.list_locked_packages()
    assert {name: found for name in page if (found := licences.find_licence(name) or page[name])} == page
    assert not [name for name, licence in page.items() if FORBIDDEN.search(licence)]
