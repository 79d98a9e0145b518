"""What the images are made of: locked versions, and two targets in step."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

IMAGE = ROOT / "deploy" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(one) for one in PROJECT["dependencies"]]
CUDA = [Requirement(one) for one in PROJECT["optional-dependencies"]["cuda"]]


def locked(target: str) -> dict[str, str]:
    """Versions by name."""
    text = (IMAGE / f"{target}.txt").read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry
    return dict(re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_lock_has_all_that_the_service_needs_as_it_needs_it(target: str) -> None:
    versions = locked(target)
    needed = [one for one in RUNTIME if one.name != "onnxruntime"] + CUDA if target == "cuda" else RUNTIME
    for requirement in needed:
        assert requirement.specifier.contains(versions[requirement.name]), requirement.name


def test_both_targets_have_the_same_packages() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    assert cpu.pop("onnxruntime")
    assert cuda.pop("onnxruntime-gpu")
    assert cpu == cuda


def test_both_targets_are_the_same_but_for_base_and_provider() -> None:
    text = (ROOT / "Dockerfile").read_text()
    cpu, cuda = (_stage(text, target) for target in ("cpu", "cuda"))
    assert [line for line in cuda if "apt-get" not in line] == cpu


def _stage(text: str, target: str) -> list[str]:
    """Its instructions, with what may differ left out."""
    (lines,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^#.*\n|\n(?=\n)|\n\Z", "", lines, flags=re.MULTILINE)
    same = plain.replace(f"--from={target}-packages", "--from=packages").replace(" FOVEA_PROVIDER=cuda", "")
    return re.sub(r"--start-period=\d+s", "", same).strip().splitlines()
