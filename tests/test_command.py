"""The command: `fovea classify`, `fovea serve`, and its help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fovea.service import __version__
from fovea.service.artifact.contract import Coverage
from fovea.service.signals import delay_interrupt
from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server


def run_fovea(*arguments: str | Path, zoo: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fovea", *arguments],
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
        path.write_bytes(make_jpeg(40 + seed, 60, seed))
    return paths


def test_json_is_what_the_service_answers(server: Server, small_zoo: Path, pictures: list[Path]) -> None:
    one = run_fovea("classify", pictures[0], "--json", "--top-k", "0", zoo=small_zoo)
    content = pictures[0].read_bytes()
    wanted = server.client.post("/v1/classify", params={"top_k": 0}, content=content).json()
    assert (one.returncode, one.stderr) == (0, "")
    assert json.loads(one.stdout) == wanted
    several = json.loads(run_fovea("classify", *pictures, "--json", zoo=small_zoo).stdout)
    files = [("f", path.read_bytes()) for path in pictures]
    wanted = server.client.post("/v1/classify", files=files).json()
    for path, result, answer in zip(pictures, several["results"], wanted["results"], strict=True):
        assert result == {"file": str(path), **answer}


def test_the_terminal_shows_labels_and_bars(small_zoo: Path, pictures: list[Path]) -> None:
    shown = run_fovea("classify", *pictures[:2], "--top-k", "2", zoo=small_zoo)
    assert shown.returncode == 0
    lines = shown.stdout.split("\n")
    assert [line for line in lines if line.endswith(".jpg")] == [str(path) for path in pictures[:2]]
    assert sum("%" in line for line in lines) == 4
    assert "█" in shown.stdout


@pytest.mark.long
def test_coverage_is_shown_and_answered_as_by_the_service(
    server: Server, small_zoo: Path, pictures: list[Path]
) -> None:
    content = pictures[0].read_bytes()
    wanted = server.client.post("/v1/classify", params={"coverage": 0.9}, content=content).json()
    one = run_fovea("classify", pictures[0], "--json", "--coverage", "0.9", zoo=small_zoo)
    assert json.loads(one.stdout) == wanted
    shown = run_fovea("classify", pictures[0], "--coverage", "0.9", zoo=small_zoo).stdout
    assert f"90% sure to be among: {', '.join(wanted['coverage']['labels'])}" in shown
    assert "too uncertain" not in shown
    refused = run_fovea("classify", pictures[0], "--coverage", "0.91", zoo=small_zoo)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "fovea: coverage 0.91 is not one of 0.5, 0.9, 0.95\n"


@pytest.mark.long
def test_the_terminal_says_when_a_set_says_too_little(tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    black.write_bytes(encode_image(Image.new("RGB", (16, 16)), "PNG"))
    graph = build_model(labels=("ant", "bee"))
    sets = (Coverage(0.5, 0.0), Coverage(0.995, 1.0))
    zoo = add_to_repository(
        with_contract(graph, replace(read_contract(graph), coverage=sets)), tmp_path / "zoo"
    )
    empty = run_fovea("classify", black, "--coverage", "0.5", zoo=zoo).stdout
    assert "50% sure to be among: none (too uncertain to decide)\n" in empty
    wide = run_fovea("classify", black, "--coverage", "0.995", zoo=zoo).stdout
    assert re.search(r"99\.5% sure to be among: (ant, bee|bee, ant) \(too uncertain to decide\)\n", wide)


@pytest.mark.long
def test_a_bad_file_is_named_and_the_others_are_answered(
    small_zoo: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/[red]bad\xff.png"))
    bad.write_bytes(encode_image(draw_picture(40, 40), "PNG")[:-200])
    ended = run_fovea("classify", bad, pictures[0], "--json", zoo=small_zoo)
    assert ended.returncode == 1
    first, second = json.loads(ended.stdout)["results"]
    assert first["error"]["code"] == "bad_image"
    assert second["predictions"]
    alone = run_fovea("classify", bad, zoo=small_zoo)
    assert alone.returncode == 1
    assert "bad_image: the PNG image cannot be decoded" in alone.stdout
    assert "[red]bad" in alone.stdout
    assert (
        json.loads(run_fovea("classify", bad, "--json", zoo=small_zoo).stdout)["error"]["code"] == "bad_image"
    )


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
    ended = run_fovea("classify", pictures[0], *arguments, zoo=small_zoo, **environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("fovea: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


# --- folders, and files that cannot be read ------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path, pictures: list[Path]) -> Path:
    """A folder of images with meaningless names, files that are not images, and files of systems."""
    folder = tmp_path / "album"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "@eaDir").mkdir()
    for place in ("b", "deep/er/a.txt", "@eaDir/thumb.jpg", ".hidden.jpg"):
        (folder / place).write_bytes(pictures[0].read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(encode_image(draw_picture(40, 40), "PNG")[:-200])
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "huge.jpg").write_bytes(pictures[0].read_bytes() + bytes(20_000))
    return folder


def test_a_folder_is_classified_and_errors_stand_in_their_places(
    small_zoo: Path, album: Path, pictures: list[Path]
) -> None:
    limits = {"FOVEA_BODY_BYTES": "20000"}
    ended = run_fovea("classify", pictures[1], album, "nowhere.jpg", "--json", zoo=small_zoo, **limits)
    reply = json.loads(ended.stdout)
    codes = {
        Path(result["file"]).name: result["error"]["code"] if "error" in result else "answered"
        for result in reply["results"]
    }
    assert codes == {
        "1.jpg": "answered",
        "b": "answered",
        "broken.png": "bad_image",
        "a.txt": "answered",
        "gone.jpg": "unreadable_file",
        "huge.jpg": "body_too_large",
        "nowhere.jpg": "unreadable_file",
    }
    assert list(codes)[:4] == ["1.jpg", "b", "broken.png", "a.txt"]
    assert ended.stderr == f"fovea: skipped 1 file without an image: {album / 'notes.txt'}\n"
    assert ended.returncode == 1
    alone = json.loads(run_fovea("classify", album / "b", "--json", zoo=small_zoo).stdout)
    assert reply["results"][1] == {
        "file": str(album / "b"),
        **{k: v for k, v in alone.items() if k != "model"},
    }
    shown = run_fovea("classify", album, zoo=small_zoo)
    assert "unreadable_file: the file cannot be read: No such file or directory" in shown.stdout
    assert shown.returncode == 1


def test_a_folder_without_images_is_an_error(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = run_fovea("classify", tmp_path / "empty", zoo=small_zoo)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"fovea: there are no images in {tmp_path / 'empty'}\n"


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_answers_come_as_they_are_there(small_zoo: Path, pictures: list[Path], option: list[str]) -> None:
    """The first answer comes before the second file, a pipe, has content; Ctrl-C leaves valid JSON."""
    pipe = pictures[0].parent / "pipe"
    os.mkfifo(pipe)
    environment = {**os.environ, "FOVEA_MODELS": str(small_zoo)}
    command: list[str | Path] = [sys.executable, "-m", "fovea", "classify", pictures[0], pipe, *option]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = ""
        while "ant" not in first and "cow" not in first:
            first += process.stdout.readline() if not option else process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, said) == (130, "")
    if option:
        (result,) = json.loads(first + rest)["results"]
        assert result["file"] == str(pictures[0])


def test_an_interruption_waits_for_the_end_of_an_answer() -> None:
    """Ctrl-C during printing would leave half a JSON document."""
    done = []
    with pytest.raises(KeyboardInterrupt), delay_interrupt():
        signal.raise_signal(signal.SIGINT)
        done.append("printed")
    assert done == ["printed"]
    with pytest.raises(KeyboardInterrupt), delay_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # someone who presses it twice wants the end now
        done.append("printed again")
    assert done == ["printed"]
    with delay_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_reader_who_leaves_ends_it_without_a_trace(small_zoo: Path, pictures: list[Path]) -> None:
    environment = {**os.environ, "FOVEA_MODELS": str(small_zoo)}
    command: list[str | Path] = [sys.executable, "-m", "fovea", "classify", *pictures, "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_terminal_without_blocks_gets_other_marks(small_zoo: Path, pictures: list[Path]) -> None:
    shown = run_fovea("classify", pictures[0], zoo=small_zoo, PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "%" in shown.stdout


# --- explain -------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_heat_map_is_that_of_the_service(server: Server, small_zoo: Path, tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.jpg", tmp_path / "heat.png"
    photo.write_bytes(make_jpeg(90, 60))
    ended = run_fovea("explain", photo, "-o", out, "--label", "cow", zoo=small_zoo)
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
        (["-o", "heat.jpg"], "--out is heat.jpg, but the heat map is a PNG; end the name with .png"),
        (["-o", "nowhere/heat.png"], "cannot write nowhere/heat.png: No such file or directory"),
        (["-o", "heat.png", "--label", "cows"], "there is no label 'cows'; the nearest is 'cow'"),
        (["-o", "heat.png", "--model", "other"], "there is no model 'other'; there are small"),
    ],
)
def test_what_cannot_be_explained_is_one_line_too(
    small_zoo: Path, pictures: list[Path], arguments: list[str], message: str
) -> None:
    ended = run_fovea("explain", pictures[0], *arguments, zoo=small_zoo)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"fovea: {message}\n"
    assert not Path("heat.png").exists()


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("place", ["", "small/1/model.onnx"])
def test_serve_takes_a_repository_or_a_file_by_its_path(small_zoo: Path, tmp_path: Path, place: str) -> None:
    environment = {**os.environ, "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", "FOVEA_MODELS": str(tmp_path)}
    command: list[str | Path] = [sys.executable, "-m", "fovea", "serve", small_zoo / place]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        process.terminate()
    assert "serves small version 1" in greeting
    two = run_fovea("serve", small_zoo, "--models", "elsewhere", zoo=small_zoo)
    assert (
        two.stderr
        == f"fovea: {small_zoo} and --models elsewhere are different repositories; give only one of them\n"
    )


def test_serve_takes_the_same_settings_and_refuses_the_same(small_zoo: Path) -> None:
    ended = run_fovea("serve", "--port", "99999", zoo=small_zoo)
    assert ended.returncode == 2
    assert ended.stderr.startswith("fovea: FOVEA_PORT is '99999': ")


@pytest.mark.long
def test_a_published_model_comes_beside_the_one_that_answers(small_zoo: Path, tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo", "first")
    source = small_zoo / "small" / "1" / "model.onnx"
    published = run_fovea("publish", source, zoo=zoo)
    assert published.stdout == f"published {zoo}/small/1/model.onnx\n", published.stderr
    assert (zoo / "default").read_text() == "first\n"
    for name in ("../evil", "a b", ".hidden", ""):
        refused = run_fovea("publish", source, "--name", name or "/", zoo=zoo)
        assert refused.returncode == 2
        assert "use letters, digits and . _ - with a letter or digit first" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]
    assert sorted(path.name for path in zoo.iterdir()) == ["default", "first", "small"]


def test_the_version_is_told(small_zoo: Path) -> None:
    assert run_fovea("--version", zoo=small_zoo).stdout == f"fovea {__version__}\n"


@pytest.mark.long
def test_training_on_the_runtime_s_environment_says_what_to_install(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    for arguments in (
        ("train", "--out", str(tmp_path)),
        ("export", "run", "--out", str(tmp_path)),
        ("import", "x", "--labels", "y", "--name", "z", "--out", str(tmp_path)),
    ):
        ended = run_fovea(*arguments, zoo=small_zoo, PYTHONPATH=str(tmp_path))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == "fovea: training, export and import need torch; run `make setup`\n"
