"""The release workflow: pinned actions, few permissions, and scripts that do what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import ROOT
from tests.tools import SYSTEM_REASON

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELEASE_TEXT = (ROOT / ".github" / "workflows" / "release.yml").read_text()
RELEASE: dict[str, Any] = yaml.safe_load(RELEASE_TEXT)
BASES = ROOT / "deploy" / "image" / "bases.txt"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def get_script(job: str, name: str) -> str:
    (step,) = (one for one in RELEASE["jobs"][job]["steps"] if one.get("name") == name)
    return str(step["run"])


def run_script(
    script: str, folder: Path, variables: dict[str, str], programs: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(programs)] if programs else []), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder, env={"PATH": path, "HOME": str(folder), **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_name_their_version(path: Path) -> None:
    lines = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_jobs_have_only_the_permissions_that_they_need() -> None:
    assert RELEASE["permissions"] == {}
    pushes = {"contents": "read", "packages": "write", "id-token": "write"}
    assert {name: job["permissions"] for name, job in RELEASE["jobs"].items()} == {
        "build": {"contents": "read"},
        "image": pushes,
        "chart": pushes,
        "pypi": {"id-token": "write"},
    }
    assert "secrets." not in RELEASE_TEXT.replace("secrets.GITHUB_TOKEN", "")


def test_no_checkout_leaves_its_token_behind() -> None:
    steps = [step for job in RELEASE["jobs"].values() for step in job["steps"]]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == 3
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_only_one_job_builds_the_distributions() -> None:
    builders = [name for name, job in RELEASE["jobs"].items() if "-m build" in str(job)]
    assert builders == ["build"]
    assert "build" in RELEASE["jobs"]["pypi"]["needs"]


def test_published_platforms() -> None:
    matrix = RELEASE["jobs"]["image"]["strategy"]["matrix"]["include"]
    platforms = {one["target"]: one["platforms"].split(",") for one in matrix}
    assert platforms == {"cpu": ["linux/amd64", "linux/arm64"], "cuda": ["linux/amd64"]}


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (f"v{VERSION}", ""),
        ("v9.9.9", f"the tag is v9.9.9, and the version is {VERSION}\n"),
        (VERSION, f"the tag is {VERSION}, and the version is {VERSION}\n"),
    ],
)
def test_tag_must_be_the_version(tmp_path: Path, tag: str, message: str) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    script = get_script("build", "Compare the tag with the version")
    variables = {"GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(tmp_path / "output")}
    process = run_script(script, tmp_path, variables)
    assert process.stderr == message
    assert (process.returncode == 0) == (not message)
    if not message:
        assert (tmp_path / "output").read_text() == f"version={VERSION}\n"
        (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
        process = run_script(script, tmp_path, variables)
        assert process.stderr == f"CHANGELOG.md has no section {VERSION}\n"
        assert process.returncode == 1


@pytest.mark.parametrize(("target", "base"), [("cpu", "python:3.12-slim"), ("cuda", "nvidia/cuda:")])
def test_image_is_built_from_digests_and_signed_by_its_own(tmp_path: Path, target: str, base: str) -> None:
    """Run the script with a Docker and a Cosign that write down their arguments."""
    programs = tmp_path / "programs"
    programs.mkdir()
    metadata = '{"containerimage.digest":"sha256:abc"}'
    stubs = {
        "docker": f"printf '%s\\n' \"$@\" > docker.txt; echo '{metadata}' > metadata.json",
        "cosign": 'printf "%s\\n" "$@" > cosign.txt',
        "git": "echo 2026-11-30T00:00:00+00:00",
        "jq": 'sed -n \'s/.*"containerimage.digest":"\\([^"]*\\)".*/\\1/p\' metadata.json',
    }
    for name, line in stubs.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "deploy" / "image").mkdir(parents=True)
    shutil.copy(BASES, tmp_path / "deploy" / "image")
    script = get_script("image", "Build and push, with SBOM and provenance")
    variables = {
        "TARGET": target, "PLATFORMS": "linux/amd64,linux/arm64", "SUFFIX": "-x", "VERSION": "1.2.3",
        "SOURCE": "https://example.com/Some/Fovea", "IMAGE": "example.com/Some/Fovea", "GITHUB_SHA": "0" * 40,
        "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    process = run_script(script, tmp_path, variables, programs)
    assert process.returncode == 0, process.stderr
    words = (tmp_path / "docker.txt").read_text().splitlines()
    assert {"--sbom=true", "--provenance=mode=max", "--push", "linux/amd64,linux/arm64"} <= set(words)
    assert [word for word in words if "_IMAGE=" in word] == BASES.read_text().splitlines()[1:]
    assert {"example.com/some/fovea:1.2.3-x", "example.com/some/fovea:1.2-x"} <= set(words)
    labels = dict(
        word.removeprefix("org.opencontainers.image.").split("=", 1) for word in words if ".image." in word
    )
    assert labels["base.name"].startswith(base)
    assert labels["base.digest"].startswith("sha256:")
    assert (labels["version"], labels["revision"]) == ("1.2.3", "0" * 40)
    assert labels["source"] == "https://example.com/Some/Fovea"
    cosign = (tmp_path / "cosign.txt").read_text().splitlines()
    assert cosign == ["sign", "--yes", "example.com/some/fovea@sha256:abc"]


def test_chart_is_pushed_with_the_published_image(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, line in {"helm": "echo Digest: sha256:abc", "cosign": 'echo "$@" > cosign.txt'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "deploy").mkdir()
    shutil.copytree(ROOT / "deploy" / "helm", tmp_path / "deploy" / "helm")
    script = get_script("chart", "Package, push and sign")
    variables = {"VERSION": "1.2.3", "IMAGE": "example.com/Some/Fovea", "RUNNER_TEMP": str(tmp_path)}
    process = run_script(script, tmp_path, variables, programs)
    assert process.returncode == 0, process.stderr
    values = yaml.safe_load((tmp_path / "deploy" / "helm" / "fovea" / "values.yaml").read_text())
    assert values["image"]["repository"] == "example.com/some/fovea"
    signed = (tmp_path / "cosign.txt").read_text()
    assert signed == "sign --yes example.com/some/fovea/charts/fovea@sha256:abc\n"


def test_released_bases_are_the_dockerfiles_by_digest() -> None:
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    released = dict(re.findall(r"^(\w+)=(\S+)@sha256:[0-9a-f]{64}$", BASES.read_text(), re.MULTILINE))
    assert defaults == released
    froms = re.findall(r"^FROM (\S+) AS", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(froms) == {f"${{{name}}}" for name in defaults}


def find_linter(name: str) -> str:
    program = shutil.which(name) or shutil.which(name, path=str(ROOT / ".venv" / "bin"))
    if program is None:
        pytest.skip(f"{SYSTEM_REASON}has no {name}: make chart-test installs it")
    return program


@pytest.mark.parametrize(
    "command",
    [
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
        ["zizmor", "--offline", "--no-progress", "--persona", "pedantic"],
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command: list[str]) -> None:
    words = [find_linter(command[0]), *command[1:], *map(str, WORKFLOWS)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
