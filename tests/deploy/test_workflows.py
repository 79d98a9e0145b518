"""The release workflow: pinned actions, few permissions, and scripts that do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.pictures import make_jpeg
from tests.servers import ROOT, Server
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


def make_checkout(folder: Path) -> None:
    """Create a repository with the files that name the version, whose commit is on the branch `main`."""
    for name in ("pyproject.toml", "CHANGELOG.md", "deploy/helm/fovea/Chart.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        run_git(folder, *words)
    run_git(folder, "update-ref", "refs/remotes/origin/main", "HEAD")


def run_git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (f"v{VERSION}", ""),
        ("v9.9.9", f"the tag is v9.9.9, and the version is {VERSION}\n"),
        (VERSION, f"the tag is {VERSION}, and the version is {VERSION}\n"),
    ],
)
def test_tag_must_be_the_version(tmp_path: Path, tag: str, message: str) -> None:
    make_checkout(tmp_path)
    process = _compare_the_tag(tmp_path, tag)
    assert process.stderr == message
    assert (process.returncode == 0) == (not message)
    if not message:
        assert (tmp_path / "output").read_text() == f"version={VERSION}\n"


def _compare_the_tag(folder: Path, tag: str = f"v{VERSION}") -> subprocess.CompletedProcess[str]:
    script = get_script("build", "Compare the tag with the version")
    variables = {"GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(folder / "output"), "BRANCH": "main"}
    return run_script(script, folder, variables)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CHANGELOG.md", f"## [{VERSION}]", "## [9]", f"CHANGELOG.md has no section {VERSION}\n"),
        ("deploy/helm/fovea/Chart.yaml", f"\nversion: {VERSION}", "\nversion: 9", "run make chart\n"),
        ("deploy/helm/fovea/Chart.yaml", f'"{VERSION}"', '"9"', "run make chart\n"),
    ],
)
def test_every_file_must_have_the_version(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    make_checkout(tmp_path)
    text = (tmp_path / name).read_text()
    assert text.count(old) == 1
    (tmp_path / name).write_text(text.replace(old, new))
    process = _compare_the_tag(tmp_path)
    assert process.stderr.endswith(message)
    assert process.returncode == 1
    assert not (tmp_path / "output").exists()


def test_tag_must_be_on_the_default_branch(tmp_path: Path) -> None:
    make_checkout(tmp_path)
    run_git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "not reviewed")
    process = _compare_the_tag(tmp_path)
    assert process.stderr == "the tag is not on main, where changes are reviewed and tested\n"
    assert process.returncode == 1
    checkout = RELEASE["jobs"]["build"]["steps"][0]
    assert checkout["with"]["fetch-depth"] == 0


def make_programs(folder: Path, **lines: str) -> Path:
    """Create programs that run one line of shell each, and return their folder."""
    programs = folder / "programs"
    programs.mkdir()
    for name, line in lines.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return programs


@pytest.mark.parametrize(("target", "base"), [("cpu", "python:3.12-slim"), ("cuda", "nvidia/cuda:")])
def test_image_is_built_from_digests_and_pushed_without_a_tag(tmp_path: Path, target: str, base: str) -> None:
    """Run the script with a Docker that writes down its arguments."""
    metadata = '{"containerimage.digest":"sha256:abc"}'
    programs = make_programs(
        tmp_path,
        docker=f"printf '%s\\n' \"$@\" > docker.txt; echo '{metadata}' > metadata.json",
        git="echo 2026-11-30T00:00:00+00:00",
        jq='sed -n \'s/.*"containerimage.digest":"\\([^"]*\\)".*/\\1/p\' metadata.json',
    )
    (tmp_path / "deploy" / "image").mkdir(parents=True)
    shutil.copy(BASES, tmp_path / "deploy" / "image")
    script = get_script("image", "Build and push by digest, with SBOM and provenance")
    variables = {
        "TARGET": target, "PLATFORMS": "linux/amd64,linux/arm64", "VERSION": "1.2.3",
        "SOURCE": "https://example.com/Some/Fovea", "IMAGE": "example.com/Some/Fovea", "GITHUB_SHA": "0" * 40,
        "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }  # fmt: skip
    process = run_script(script, tmp_path, variables, programs)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "output").read_text() == "name=example.com/some/fovea@sha256:abc\n"
    words = (tmp_path / "docker.txt").read_text().splitlines()
    assert {"--provenance=mode=max", "linux/amd64,linux/arm64"} <= set(words)
    assert [word for word in words if "_IMAGE=" in word] == BASES.read_text().splitlines()[1:]
    assert "--tag" not in words
    assert "type=image,name=example.com/some/fovea,push-by-digest=true,name-canonical=true,push=true" in words
    labels = dict(
        word.removeprefix("org.opencontainers.image.").split("=", 1) for word in words if ".image." in word
    )
    assert labels["base.name"].startswith(base)
    assert labels["base.digest"].startswith("sha256:")
    assert (labels["version"], labels["revision"]) == ("1.2.3", "0" * 40)
    assert labels["source"] == "https://example.com/Some/Fovea"


SIGNING = {
    "NAME": "example.com/some/fovea@sha256:abc",
    "SUFFIX": "-x",
    "VERSION": "1.2.3",
    "RUNNER_TEMP": "/temp",
}


@pytest.mark.parametrize("digest", ["sha256:abc", "sha256:def"])
def test_signed_image_gets_its_tags(tmp_path: Path, digest: str) -> None:
    programs = make_programs(
        tmp_path,
        docker=f'echo docker "$@" >> calls.txt; [ "$3" = create ] || echo {digest}',
        cosign='echo cosign "$@" >> calls.txt',
    )
    script = get_script("image", "Sign the image, attest its packages, and give it its tags")
    process = run_script(script, tmp_path, SIGNING, programs)
    image = "example.com/some/fovea"
    assert (tmp_path / "calls.txt").read_text().splitlines()[:3] == [
        f"cosign sign --yes {image}@sha256:abc",
        f"cosign attest --yes --type cyclonedx --predicate /temp/fovea-image.cdx.json {image}@sha256:abc",
        f"docker buildx imagetools create --tag {image}:1.2.3-x --tag {image}:1.2-x {image}@sha256:abc",
    ]
    assert process.returncode == (digest != "sha256:abc")


def test_image_without_a_signature_gets_no_tag(tmp_path: Path) -> None:
    programs = make_programs(tmp_path, docker="touch called", cosign="exit 1")
    script = get_script("image", "Sign the image, attest its packages, and give it its tags")
    assert run_script(script, tmp_path, SIGNING, programs).returncode != 0
    assert not (tmp_path / "called").exists()


def render_answer(label: str) -> str:
    """Return an answer as `/v1/classify` and `fovea classify --json` give it."""
    answer = {"model": {"name": "a", "version": "1"}, "predictions": [{"label": label, "index": 8}]}
    return json.dumps(answer, separators=(",", ":"))


@pytest.mark.parametrize(("label", "status"), [("ship", 0), ("cat", 1)])
def test_wheel_that_does_not_classify_is_not_published(tmp_path: Path, label: str, status: int) -> None:
    """The name of the picture must not pass for an answer."""
    fake = tmp_path / "fake"
    fake.write_text(f"#!/bin/sh\necho samples/ship.jpg\necho '{render_answer(label)}'\n")
    fake.chmod(0o755)
    make_venv = 'mkdir -p "$3/bin" && cp fake "$3/bin/pip" && cp fake "$3/bin/fovea"'
    programs = make_programs(tmp_path, python3=make_venv)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "a.whl").touch()
    variables = {"RUNNER_TEMP": str(tmp_path), "GITHUB_WORKSPACE": str(ROOT)}
    process = run_script(get_script("build", "Classify with the wheel alone"), tmp_path, variables, programs)
    assert process.returncode == status, process.stderr
    assert "samples/ship.jpg" in (tmp_path / "answer").read_text()


def test_service_answers_as_the_release_expects(server: Server) -> None:
    reply = server.client.post("/v1/classify?top_k=1", content=make_jpeg())
    assert re.search(r'"predictions":\[{"label":"', reply.text)
    assert (ROOT / "samples" / "ship.jpg").exists()


@pytest.mark.parametrize(("label", "status"), [("ship", 0), ("cat", 1), (None, 1)])
def test_image_that_does_not_classify_is_not_signed(tmp_path: Path, label: str | None, status: int) -> None:
    """The script asks the service of the container, and prints its log if the answer is wrong."""
    write = f"echo '{render_answer(label)}' > answer" if label else "exit 7"
    programs = make_programs(tmp_path, docker='echo docker "$@"', curl=write)
    script = get_script("image", "Classify with the image, as a restricted container")
    variables = {"NAME": "example.com/fovea@sha256:abc", "RUNNER_TEMP": str(tmp_path)}
    process = run_script(script, tmp_path, variables, programs)
    assert process.returncode == status
    assert ("docker logs fovea" in process.stdout) == (status != 0)
    steps = [step.get("name") for step in RELEASE["jobs"]["image"]["steps"]]
    assert steps[-4:] == [
        "Build and push by digest, with SBOM and provenance",
        "Classify with the image, as a restricted container",
        "List the packages of the image (CycloneDX)",
        "Sign the image, attest its packages, and give it its tags",
    ]


def test_chart_is_pushed_with_the_published_image(tmp_path: Path) -> None:
    programs = make_programs(tmp_path, helm="echo Digest: sha256:abc", cosign='echo "$@" > cosign.txt')
    process = _push_chart(tmp_path, programs)
    assert process.returncode == 0, process.stderr
    values = yaml.safe_load((tmp_path / "deploy" / "helm" / "fovea" / "values.yaml").read_text())
    assert values["image"]["repository"] == "example.com/some/fovea"
    signed = (tmp_path / "cosign.txt").read_text()
    assert signed == "sign --yes example.com/some/fovea/charts/fovea@sha256:abc\n"


def test_chart_without_a_digest_is_not_signed(tmp_path: Path) -> None:
    programs = make_programs(tmp_path, helm="echo pushed", cosign="touch called")
    process = _push_chart(tmp_path, programs)
    assert process.stderr == "helm push has named no digest\n"
    assert process.returncode == 1
    assert not (tmp_path / "called").exists()


def _push_chart(folder: Path, programs: Path) -> subprocess.CompletedProcess[str]:
    (folder / "deploy").mkdir()
    shutil.copytree(ROOT / "deploy" / "helm", folder / "deploy" / "helm")
    script = get_script("chart", "Package, push and sign")
    variables = {"VERSION": "1.2.3", "IMAGE": "example.com/Some/Fovea", "RUNNER_TEMP": str(folder)}
    return run_script(script, folder, variables, programs)


def test_images_that_the_build_runs_are_pinned_by_digest() -> None:
    """QEMU, BuildKit and the scanner run with rights over the job, as actions do."""
    steps = {
        step["uses"].partition("@")[0]: step for step in RELEASE["jobs"]["image"]["steps"] if "uses" in step
    }
    script = get_script("image", "Build and push by digest, with SBOM and provenance")
    images = [
        steps["docker/setup-qemu-action"]["with"]["image"],
        steps["docker/setup-buildx-action"]["with"]["driver-opts"].removeprefix("image="),
        *re.findall(r"--attest type=sbom,generator=(\S+)", script),
    ]
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"docker\.io/[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_build_tools_are_locked() -> None:
    text = (ROOT / "deploy" / "release-tools.txt").read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry
    versions = dict(re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE))
    assert {"build", "twine"} <= versions.keys()
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    for line in build_system["requires"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[requirement.name])
    script = get_script("build", "Build")
    assert "--require-hashes" in script
    assert "--no-isolation" in script  # otherwise pip would fetch a build system without hashes


def test_wheel_is_stored_before_unlocked_packages_run() -> None:
    """The packages that the wheel requires are not locked there: they must not change what is published."""
    steps = RELEASE["jobs"]["build"]["steps"]
    names = [step.get("name") or step["with"].get("name") for step in steps]
    order = ["Build", "dist", "Audit all locked packages", "Classify with the wheel alone"]
    assert [name for name in names if name in order] == order
    assert names.count("dist") == 1
    for job, name in (
        ("build", "Audit all locked packages"),
        ("image", "List the packages of the image (CycloneDX)"),
    ):
        assert "--require-hashes --only-binary :all: -r deploy/audit-tools.txt" in get_script(job, name)
    assert "deploy/audit.py --strict" in get_script("build", "Audit all locked packages")


def test_signature_is_checked_for_the_repository_and_the_tag() -> None:
    """A pattern that names only the workflow's file is true of every repository with such a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (quote,) = re.findall(r"--certificate-identity-regexp '(.+)'", text)
    pattern = re.compile(quote)
    ours = "https://github.com/OWNER/REPOSITORY/.github/workflows/release.yml@refs/tags/v1.2.3"
    assert pattern.search(ours)
    for identity in (
        ours.replace("OWNER", "other"),
        ours.replace("release.yml", "other.yml"),
        ours.replace("tags/v1.2.3", "heads/main"),
        f"https://example.com/{ours}",
        f"{ours}-rc/../..",
    ):
        assert not pattern.search(identity), identity


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
