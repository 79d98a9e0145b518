"""`fovea classify`, `explain`, `serve`, `publish` and `--version` on the command line."""

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
        timeout=300,
        check=False,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Return the paths of eight valid pictures."""
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for seed, path in enumerate(paths):
        path.write_bytes(make_jpeg(40 + seed, 60, seed))
    return paths


def test_json_output_equals_service_answer(server: Server, small_zoo: Path, pictures: list[Path]) -> None:
    process = run_fovea("classify", pictures[0], "--json", "--top-k", "0", zoo=small_zoo)
    content = pictures[0].read_bytes()
    expected = server.client.post("/v1/classify", params={"top_k": 0}, content=content).json()
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout) == expected
    batch = json.loads(run_fovea("classify", *pictures, "--json", zoo=small_zoo).stdout)
    files = [("f", path.read_bytes()) for path in pictures]
    expected = server.client.post("/v1/classify", files=files).json()
    for path, result, answer in zip(pictures, batch["results"], expected["results"], strict=True):
        assert result == {"file": str(path), **answer}


def test_terminal_output_shows_labels_and_bars(small_zoo: Path, pictures: list[Path]) -> None:
    process = run_fovea("classify", *pictures[:2], "--top-k", "2", zoo=small_zoo)
    assert process.returncode == 0
    lines = process.stdout.split("\n")
    assert [line for line in lines if line.endswith(".jpg")] == [str(path) for path in pictures[:2]]
    assert sum("%" in line for line in lines) == 4
    assert "█" in process.stdout


@pytest.mark.long
def test_coverage_output_equals_service_answer(server: Server, small_zoo: Path, pictures: list[Path]) -> None:
    content = pictures[0].read_bytes()
    expected = server.client.post("/v1/classify", params={"coverage": 0.9}, content=content).json()
    json_process = run_fovea("classify", pictures[0], "--json", "--coverage", "0.9", zoo=small_zoo)
    assert json.loads(json_process.stdout) == expected
    text = run_fovea("classify", pictures[0], "--coverage", "0.9", zoo=small_zoo).stdout
    sentence = "for images like the test images, the true label is among these in 90% of cases"
    assert f"{sentence}: {', '.join(expected['coverage']['labels'])}" in text
    assert "too uncertain" not in text
    refusal = run_fovea("classify", pictures[0], "--coverage", "0.91", zoo=small_zoo)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr == "fovea: coverage 0.91 is not one of 0.5, 0.9, 0.95\n"


@pytest.mark.long
def test_empty_and_full_sets_are_marked_as_too_uncertain(tmp_path: Path) -> None:
    black_picture = tmp_path / "black.png"
    black_picture.write_bytes(encode_image(Image.new("RGB", (16, 16)), "PNG"))
    graph = build_model(labels=("ant", "bee"))
    coverage = (Coverage(0.5, 0.0), Coverage(0.995, 1.0))
    zoo = add_to_repository(
        with_contract(graph, replace(read_contract(graph), coverage=coverage)), tmp_path / "zoo"
    )
    empty_set_output = run_fovea("classify", black_picture, "--coverage", "0.5", zoo=zoo).stdout
    assert "in 50% of cases: none (too uncertain to decide)\n" in empty_set_output
    full_set_output = run_fovea("classify", black_picture, "--coverage", "0.995", zoo=zoo).stdout
    assert re.search(
        r"in 99\.5% of cases: (ant, bee|bee, ant) \(too uncertain to decide\)\n", full_set_output
    )


@pytest.mark.long
def test_bad_file_is_named_and_other_files_are_classified(
    small_zoo: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad_path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/[red]bad\xff.png"))
    bad_path.write_bytes(encode_image(draw_picture(40, 40), "PNG")[:-200])
    process = run_fovea("classify", bad_path, pictures[0], "--json", zoo=small_zoo)
    assert process.returncode == 1
    first, second = json.loads(process.stdout)["results"]
    assert first["error"]["code"] == "bad_image"
    assert second["predictions"]
    bad_file_process = run_fovea("classify", bad_path, zoo=small_zoo)
    assert bad_file_process.returncode == 1
    assert "bad_image: the PNG image cannot be decoded" in bad_file_process.stdout
    assert "[red]bad" in bad_file_process.stdout
    assert (
        json.loads(run_fovea("classify", bad_path, "--json", zoo=small_zoo).stdout)["error"]["code"]
        == "bad_image"
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
def test_invalid_classify_call_ends_with_one_error_line(
    small_zoo: Path,
    pictures: list[Path],
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    process = run_fovea("classify", pictures[0], *arguments, zoo=small_zoo, **environment)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("fovea: ")
    assert message in process.stderr
    assert process.stderr.count("\n") == 1


# --- folders, and files that cannot be read ------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path, pictures: list[Path]) -> Path:
    """Return a folder with images without extensions, invalid images, other files and system files."""
    folder = tmp_path / "album"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "@eaDir").mkdir()
    for place in ("b", "deep/er/a.txt", "@eaDir/thumb.jpg", ".hidden.jpg"):
        (folder / place).write_bytes(pictures[0].read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(encode_image(draw_picture(40, 40), "PNG")[:-200])
    (folder / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")  # nobody writes
    (folder / "huge.jpg").write_bytes(pictures[0].read_bytes() + bytes(20_000))
    return folder


def test_folder_results_and_errors_keep_file_order(
    small_zoo: Path, album: Path, pictures: list[Path]
) -> None:
    limits = {"FOVEA_BODY_BYTES": "20000"}
    process = run_fovea("classify", pictures[1], album, "nowhere.jpg", "--json", zoo=small_zoo, **limits)
    reply = json.loads(process.stdout)
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
    assert process.stderr == (
        f"fovea: skipped 2 files without an image: {album / 'notes.txt'}, {album / 'pipe'}\n"
    )
    assert process.returncode == 1
    single_reply = json.loads(run_fovea("classify", album / "b", "--json", zoo=small_zoo).stdout)
    assert reply["results"][1] == {
        "file": str(album / "b"),
        **{k: v for k, v in single_reply.items() if k != "model"},
    }
    text_process = run_fovea("classify", album, zoo=small_zoo)
    assert "unreadable_file: the file cannot be read: No such file or directory" in text_process.stdout
    assert text_process.returncode == 1


def test_folder_without_images_is_an_error(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = run_fovea("classify", tmp_path / "empty", zoo=small_zoo)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"fovea: there are no images in {tmp_path / 'empty'}\n"


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_answers_are_printed_before_all_files_are_read(
    small_zoo: Path, pictures: list[Path], option: list[str]
) -> None:
    """The second file is a pipe without content. Ctrl-C leaves valid JSON."""
    pipe = pictures[0].parent / "pipe"
    os.mkfifo(pipe)
    environment = {**os.environ, "FOVEA_MODELS": str(small_zoo)}
    command: list[str | Path] = [sys.executable, "-m", "fovea", "classify", pictures[0], pipe, *option]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first_output = ""
        while "ant" not in first_output and "cow" not in first_output:
            first_output += process.stdout.readline() if not option else process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        remaining_output = process.stdout.read()
        assert process.stderr is not None
        error_output = process.stderr.read()
    assert (process.returncode, error_output) == (130, "")
    if option:
        (result,) = json.loads(first_output + remaining_output)["results"]
        assert result["file"] == str(pictures[0])


def test_interrupt_waits_until_answer_is_printed() -> None:
    """Ctrl-C during printing would leave an incomplete JSON document."""
    steps = []
    with pytest.raises(KeyboardInterrupt), delay_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("printed")
    assert steps == ["printed"]
    with pytest.raises(KeyboardInterrupt), delay_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the second Ctrl-C interrupts at once
        steps.append("printed again")
    assert steps == ["printed"]
    with delay_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_closed_stdout_ends_command_without_traceback(small_zoo: Path, pictures: list[Path]) -> None:
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


def test_ascii_terminal_shows_percentages(small_zoo: Path, pictures: list[Path]) -> None:
    process = run_fovea("classify", pictures[0], zoo=small_zoo, PYTHONIOENCODING="ascii")
    assert (process.returncode, process.stderr) == (0, "")
    assert "%" in process.stdout


# --- explain -------------------------------------------------------------------------------------


@pytest.mark.long
def test_explain_writes_heat_map_of_service(server: Server, small_zoo: Path, tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.jpg", tmp_path / "heat.png"
    photo.write_bytes(make_jpeg(90, 60))
    process = run_fovea("explain", photo, "-o", out, "--label", "cow", zoo=small_zoo)
    assert (process.returncode, process.stderr) == (0, "")
    assert re.fullmatch(
        rf"cow  \d+\.\d%  by its class activation map\nwrote {re.escape(str(out))}\n", process.stdout
    )
    params = {"format": "png", "label": "cow"}
    assert (
        server.client.post("/v1/explain", content=photo.read_bytes(), params=params).content
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
def test_invalid_explain_call_ends_with_one_error_line(
    small_zoo: Path, pictures: list[Path], arguments: list[str], message: str
) -> None:
    process = run_fovea("explain", pictures[0], *arguments, zoo=small_zoo)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"fovea: {message}\n"
    assert not Path("heat.png").exists()


# --- serve, publish and others -------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("place", ["", "small/1/model.onnx"])
def test_serve_accepts_repository_or_model_file(small_zoo: Path, tmp_path: Path, place: str) -> None:
    environment = {**os.environ, "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", "FOVEA_MODELS": str(tmp_path)}
    command: list[str | Path] = [sys.executable, "-m", "fovea", "serve", small_zoo / place]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        process.terminate()
    assert "serves small version 1" in greeting
    refusal = run_fovea("serve", small_zoo, "--models", "elsewhere", zoo=small_zoo)
    assert (
        refusal.stderr
        == f"fovea: {small_zoo} and --models elsewhere are different repositories; give only one of them\n"
    )


def test_serve_rejects_invalid_port_option(small_zoo: Path) -> None:
    process = run_fovea("serve", "--port", "99999", zoo=small_zoo)
    assert process.returncode == 2
    assert process.stderr.startswith("fovea: FOVEA_PORT is '99999': ")


@pytest.mark.long
def test_publish_keeps_default_model_and_rejects_bad_names(small_zoo: Path, tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo", "first")
    source = small_zoo / "small" / "1" / "model.onnx"
    process = run_fovea("publish", source, zoo=zoo)
    assert process.stdout == f"published {zoo}/small/1/model.onnx\n", process.stderr
    assert (zoo / "default").read_text() == "first\n"
    for name in ("../evil", "a b", ".hidden", ""):
        refusal = run_fovea("publish", source, "--name", name or "/", zoo=zoo)
        assert refusal.returncode == 2
        assert "use letters, digits and . _ - with a letter or digit first" in refusal.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]
    assert sorted(path.name for path in zoo.iterdir()) == ["default", "first", "small"]


def test_version_option_prints_version(small_zoo: Path) -> None:
    assert run_fovea("--version", zoo=small_zoo).stdout == f"fovea {__version__}\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("torch", ("train",)),
        ("torch", ("export", "run")),
        ("onnx", ("import", "x", "--labels", "y", "--name", "z")),  # an ONNX file needs no torch
    ],
)
def test_training_commands_without_a_package_name_make_setup(
    small_zoo: Path, tmp_path: Path, missing: str, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    process = run_fovea(*arguments, "--out", str(tmp_path), zoo=small_zoo, PYTHONPATH=str(tmp_path))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"fovea: training, export and import need {missing}; run `make setup`\n"
