"""The command: `fovea classify`, `fovea serve`, and its help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from service import __version__
from service.contract import Coverage
from tests.graphs import build, contract_of, publish, with_contract
from tests.pictures import encode, jpeg, picture
from tests.servers import ROOT, Server


def fovea(*arguments: str | Path, zoo: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "fovea.py", *arguments],
        env={**os.environ, "FOVEA_MODELS": str(zoo), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Eight good pictures."""
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for seed, path in enumerate(paths):
        path.write_bytes(jpeg(40 + seed, 60, seed))
    return paths


def test_json_is_what_the_service_answers(server: Server, small_zoo: Path, pictures: list[Path]) -> None:
    one = fovea("classify", pictures[0], "--json", "--top-k", "0", zoo=small_zoo)
    content = pictures[0].read_bytes()
    wanted = server.client.post("/v1/classify", params={"top_k": 0}, content=content).json()
    assert (one.returncode, one.stderr) == (0, "")
    assert json.loads(one.stdout) == wanted
    several = json.loads(fovea("classify", *pictures, "--json", zoo=small_zoo).stdout)
    files = [("f", path.read_bytes()) for path in pictures]
    wanted = server.client.post("/v1/classify", files=files).json()
    for path, result, answer in zip(pictures, several["results"], wanted["results"], strict=True):
        assert result == {"file": str(path), **answer}


def test_the_terminal_shows_labels_and_bars(small_zoo: Path, pictures: list[Path]) -> None:
    shown = fovea("classify", *pictures[:2], "--top-k", "2", zoo=small_zoo)
    assert shown.returncode == 0
    lines = shown.stdout.split("\n")
    assert [line for line in lines if line.endswith(".jpg")] == [str(path) for path in pictures[:2]]
    assert sum("%" in line for line in lines) == 4
    assert "█" in shown.stdout


def test_coverage_is_shown_and_answered_as_by_the_service(
    server: Server, small_zoo: Path, pictures: list[Path]
) -> None:
    content = pictures[0].read_bytes()
    wanted = server.client.post("/v1/classify", params={"coverage": 0.9}, content=content).json()
    one = fovea("classify", pictures[0], "--json", "--coverage", "0.9", zoo=small_zoo)
    assert json.loads(one.stdout) == wanted
    shown = fovea("classify", pictures[0], "--coverage", "0.9", zoo=small_zoo).stdout
    assert f"90% sure to be among: {', '.join(wanted['coverage']['labels'])}" in shown
    assert "too little" not in shown
    refused = fovea("classify", pictures[0], "--coverage", "0.91", zoo=small_zoo)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "fovea: coverage 0.91 is not one of 0.5, 0.9, 0.95\n"


def test_the_terminal_says_when_a_set_says_too_little(tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    black.write_bytes(encode(Image.new("RGB", (16, 16)), "PNG"))
    graph = build(labels=("ant", "bee"))
    sets = (Coverage(0.5, 0.0), Coverage(0.995, 1.0))
    zoo = publish(with_contract(graph, replace(contract_of(graph), coverage=sets)), tmp_path / "zoo")
    empty = fovea("classify", black, "--coverage", "0.5", zoo=zoo).stdout
    assert "50% sure to be among: none (too little to go by)\n" in empty
    wide = fovea("classify", black, "--coverage", "0.995", zoo=zoo).stdout
    assert re.search(r"99\.5% sure to be among: (ant, bee|bee, ant) \(too little to go by\)\n", wide)


def test_a_bad_file_is_named_and_the_others_are_answered(
    small_zoo: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/[red]bad\xff.png"))
    bad.write_bytes(encode(picture(40, 40), "PNG")[:-200])
    ended = fovea("classify", bad, pictures[0], "--json", zoo=small_zoo)
    assert ended.returncode == 1
    first, second = json.loads(ended.stdout)["results"]
    assert first["error"]["code"] == "bad_image"
    assert second["predictions"]
    alone = fovea("classify", bad, zoo=small_zoo)
    assert alone.returncode == 1
    assert "bad_image: the PNG image cannot be decoded" in alone.stdout
    assert "[red]bad" in alone.stdout
    assert json.loads(fovea("classify", bad, "--json", zoo=small_zoo).stdout)["error"]["code"] == "bad_image"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--model", "other"], {}, "there is no model 'other'; there are small"),
        (["--models", "nowhere"], {}, "FOVEA_MODELS is"),
        ([], {"FOVEA_PROVIDER": "tpu"}, "FOVEA_PROVIDER is 'tpu'"),
        ([], {"FOVEA_MODLES": "x"}, "did you mean FOVEA_MODELS?"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    small_zoo: Path,
    pictures: list[Path],
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    ended = fovea("classify", pictures[0], *arguments, zoo=small_zoo, **environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("fovea: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


# --- explain -------------------------------------------------------------------------------------


def test_the_heat_map_is_that_of_the_service(server: Server, small_zoo: Path, tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.jpg", tmp_path / "heat.png"
    photo.write_bytes(jpeg(90, 60))
    ended = fovea("explain", photo, "-o", out, "--label", "cow", zoo=small_zoo)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(
        rf"cow  \d+\.\d%  by its class activation map\nwrote {re.escape(str(out))}\n", ended.stdout
    )
    asked = {"format": "png", "label": "cow"}
    assert (
        server.client.post("/v1/explain", content=photo.read_bytes(), params=asked).content
        == out.read_bytes()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "heat.jpg"], "the picture is a PNG, and is not called heat.jpg"),
        (["-o", "nowhere/heat.png"], "cannot write nowhere/heat.png: No such file or directory"),
        (["-o", "heat.png", "--label", "cows"], "there is no label 'cows'; the nearest is 'cow'"),
        (["-o", "heat.png", "--model", "other"], "there is no model 'other'; there are small"),
    ],
)
def test_what_cannot_be_explained_is_one_line_too(
    small_zoo: Path, pictures: list[Path], arguments: list[str], message: str
) -> None:
    ended = fovea("explain", pictures[0], *arguments, zoo=small_zoo)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"fovea: {message}\n"
    assert not Path("heat.png").exists()


# --- the rest ------------------------------------------------------------------------------------


def test_serve_takes_the_same_settings_and_refuses_the_same(small_zoo: Path) -> None:
    ended = fovea("serve", "--port", "99999", zoo=small_zoo)
    assert ended.returncode == 2
    assert ended.stderr.startswith("fovea: FOVEA_PORT is '99999': ")


def test_a_published_model_comes_beside_the_one_that_answers(small_zoo: Path, tmp_path: Path) -> None:
    zoo = publish(build(), tmp_path / "zoo", "first")
    source = small_zoo / "small" / "1" / "model.onnx"
    published = fovea("publish", source, zoo=zoo)
    assert published.stdout == f"published {zoo}/small/1/model.onnx\n", published.stderr
    assert (zoo / "default").read_text() == "first\n"
    for name in ("../evil", "a b", ".hidden", ""):
        refused = fovea("publish", source, "--name", name or "/", zoo=zoo)
        assert refused.returncode == 2
        assert "letters, digits and . _ - are taken" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]
    assert sorted(path.name for path in zoo.iterdir()) == ["default", "first", "small"]


def test_the_version_is_told(small_zoo: Path) -> None:
    assert fovea("--version", zoo=small_zoo).stdout == f"fovea {__version__}\n"


def test_training_on_the_runtime_s_environment_says_what_to_install(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    for arguments in (
        ("train", "--out", str(tmp_path)),
        ("export", "run", "--out", str(tmp_path)),
        ("import", "x", "--labels", "y", "--name", "z", "--out", str(tmp_path)),
    ):
        ended = fovea(*arguments, zoo=small_zoo, PYTHONPATH=str(tmp_path))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == "fovea: training, export and import need torch; run `make setup`\n"


def test_help_lists_every_command(small_zoo: Path) -> None:
    shown = fovea("--help", zoo=small_zoo).stdout
    for command in ("serve", "classify", "train", "export", "import"):
        assert command in shown
        assert fovea(command, "--help", zoo=small_zoo).returncode == 0
