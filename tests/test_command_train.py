"""`fovea train` and `fovea export` on the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fovea.model.data.dataset import load_dataset
from fovea.model.evaluation.evaluate import measure_accuracy
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS_FILE
from fovea.model.networks.network import NETS
from fovea.service.artifact.contract import Accuracy, Task, Training
from fovea.service.inference.engine import Engine
from fovea.service.inference.image_format import supported_formats
from fovea.service.inference.preprocess import decode_image
from tests.commands import Command, read_error_line
from tests.conftest import ROOT
from tests.graphs import add_to_repository, build_model
from tests.servers import Server
from tests.training import draw_images

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Limit torch to one thread: with more threads than free cores, OpenMP is fifty times slower."""
    torch.set_num_threads(1)


def read_weights(folder: Path) -> bytes:
    """Return the bytes of all tensors of a checkpoint."""
    tensors = checkpoint.load_checkpoint(folder).tensors
    return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


# --- train, then export --------------------------------------------------------------------------


def test_two_labels_are_trained_and_exported_as_binary(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, out = tmp_path / "squares", tmp_path / "run", tmp_path / "zoo" / "blue-or-red" / "3"
    draw_images(source / "train", "blue", "red", count=16)
    draw_images(source / "test", "blue", "red", count=6, seed=1)
    train = ["train", "--data", source, "--out", run, "--size", 16, "--epochs", 24]
    assert command(*train) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "squares: 2 labels, 28 images to train on, 4 held out, 12 to test" in output
    assert "epoch 24/24" in output
    assert command("export", run, "--out", out) == 0
    output = " ".join(capsys.readouterr().out.split())
    for line in ("batch 1: logits agree to", "batch 64: logits agree to", "golden set: 8 images"):
        assert line in output
    assert f"wrote {out / 'model.onnx'}" in output

    engine = Engine.load(out / "model.onnx", provider="cpu", threads=1)
    assert engine.check_golden_set().images == 8
    contract, metadata = engine.contract, checkpoint.load_checkpoint(run).metadata
    assert (contract.name, contract.version, contract.labels) == ("blue-or-red", "3", ("blue", "red"))
    assert (contract.task, len(contract.thresholds)) == (Task.BINARY, 1)
    assert contract.training == Training(
        "squares", 28, metadata["commit"], "fovea " + " ".join(map(str, train))
    )
    data = load_dataset(source, size=16, validation=0.1, seed=0)
    measurement = metadata["measured"]
    accuracy = measurement["accuracy"]
    assert contract.accuracy is not None
    assert contract.accuracy.ece == pytest.approx(measurement["ece"], abs=1e-4)
    assert contract.accuracy == Accuracy("squares, test", 12, accuracy, contract.accuracy.ece)
    assert len(data.test) == measurement["images"] == 12
    assert f"accuracy {accuracy:.2%} of 12 images (squares, test)" in output
    assert json.loads((out / "report.json").read_text())["accuracy"]["top1"] == accuracy >= 0.95

    for index, label in enumerate(contract.labels):
        for file in sorted((source / "test" / label).iterdir()):
            pixels = decode_image(file.read_bytes(), contract.input, max_pixels=1_000_000).pixels
            probabilities = engine.run(pixels[None])[0]
            assert probabilities.shape == (2,)
            assert probabilities.sum() == pytest.approx(1)
            assert probabilities[index] > 0.5


def test_train_with_export_makes_the_default_model(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """`/v1/classify` answers with the labels of the exported model, although another model exists."""
    source, zoo = tmp_path / "squares", tmp_path / "zoo"
    draw_images(source / "train", count=24)
    draw_images(source / "test", count=4, seed=1)
    add_to_repository(build_model(), zoo, "animals")
    train = ["train", "--data", source, "--out", tmp_path / "run", "--size", 16, "--epochs", 12]
    assert command(*train, "--export", zoo / "squares" / "1") == 0
    assert f"next: fovea serve --models {zoo}" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    with Server(FOVEA_MODELS=str(zoo)) as server:
        for label in ("blue", "green", "red"):
            image = (source / "test" / label / "0.png").read_bytes()
            reply = server.client.post("/v1/classify?coverage=0.9", content=image).json()
            assert reply["model"] == {"name": "squares", "version": "1"}
            assert reply["predictions"][0]["label"] == label
            assert label in reply["coverage"]["labels"]
    second_train = ["train", "--data", tmp_path / "nowhere", "--export", zoo / "squares" / "1"]
    assert command(*second_train) == 2  # before anything is read
    assert f"already holds a model; the next free version is {zoo / 'squares' / '2'}" in read_error_line(
        capsys
    )
    assert command("export", tmp_path / "run", "--out", zoo / "squares" / "1") == 2
    assert command("export", tmp_path / "run", "--out", zoo / "other" / "1") == 0
    assert (zoo / "default").read_text() == "squares\n"
    assert command("export", tmp_path / "run", "--out", zoo / "third" / "1", "--default") == 0
    assert (zoo / "default").read_text() == "third\n"


@pytest.mark.parametrize(
    ("net", "size"), [("tiny_vgg", 32), ("cnn", 16), ("resnet18", 16), ("mobilenet_v2", 96)]
)
@pytest.mark.parametrize("augmentation", ["crop", "photo"])
def test_networks_of_any_size_train_through_windows(
    net: str, size: int, augmentation: str, tmp_path: Path, command: Command
) -> None:
    """Images grow from half their side, as far as the network takes such small ones."""
    data = draw_images(tmp_path / "squares", count=8)
    train = ["train", "--data", data, "--out", tmp_path / "run", "--net", net, "--size", size, "--epochs", 2]
    assert command(*train, "--augment", augmentation) == 0
    recipe = checkpoint.load_checkpoint(tmp_path / "run").metadata["recipe"]
    assert (recipe["augmentation"], recipe["growth"]) == (augmentation, 0.0 if net == "tiny_vgg" else 0.6)


def test_network_for_teaching_learns_and_has_only_the_layers_of_a_first_lesson(
    tmp_path: Path, command: Command
) -> None:
    source, version = tmp_path / "squares", tmp_path / "zoo" / "tiny" / "1"
    draw_images(source / "train", count=24)
    draw_images(source / "test", count=8, seed=1)
    train = ["train", "--data", source, "--out", tmp_path / "run", "--size", 32, "--epochs", 12]
    assert command(*train, "--net", "tiny_vgg", "--export", version) == 0
    assert (version / "model.onnx").stat().st_size <= 100_000
    engine = Engine.load(version / "model.onnx", provider="cpu", threads=1)
    assert engine.contract.temperature == 1
    recipe = checkpoint.load_checkpoint(tmp_path / "run").metadata["recipe"]
    assert recipe["peak_lr"] == pytest.approx(0.05 * recipe["batch"] / 256)
    assert recipe["cutout"] == 0
    assert engine.contract.accuracy is not None
    assert engine.contract.accuracy.top1 >= 0.9
    kinds = [layer.kind for layer in engine.contract.layers]
    block = ["Conv", "Relu"] * 2 + ["MaxPool"]
    assert kinds[kinds.index("Conv") :] == [*block, *block, "Reshape", "Gemm", "Softmax"]


def test_zoo_version_can_be_start_and_teacher(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "squares", count=24)
    train = ["train", "--data", tmp_path / "squares", "--size", 16]
    version = tmp_path / "zoo" / "squares" / "1"
    assert command(*train, "--epochs", 12, "--out", tmp_path / "first", "--export", version) == 0
    capsys.readouterr()
    assert command(*train, "--epochs", 1, "--out", tmp_path / "tuned", "--from", version) == 0
    history = checkpoint.load_checkpoint(tmp_path / "tuned").metadata["progress"]["history"]
    assert history[0]["validation_accuracy"] >= 0.9  # after one epoch, because the start was trained
    assert (
        command(
            *train,
            "--epochs",
            1,
            "--out",
            tmp_path / "pupil",
            "--teacher",
            version,
            "--teacher",
            tmp_path / "tuned",
        )
        == 0
    )
    metadata = checkpoint.load_checkpoint(tmp_path / "pupil").metadata
    digests = [sha256((run / WEIGHTS_FILE).read_bytes()).hexdigest() for run in (version, tmp_path / "tuned")]
    assert (metadata["start"]["teachers"].split(), metadata["recipe"]["teaching"]) == (digests, 0.8)
    capsys.readouterr()
    resume = [*train, "--epochs", 1, "--out", tmp_path / "pupil", "--resume"]
    assert command(*resume) == 2
    assert "holds a run with another " in read_error_line(capsys)
    draw_images(tmp_path / "others", "green", "red", count=4)
    other_train = ["train", "--data", tmp_path / "others", "--size", 16, "--out", tmp_path / "x"]
    assert command(*other_train, "--teacher", version) == 2
    assert f"the teacher in {version} has another set of labels: " in read_error_line(capsys)
    assert command(*other_train, "--from", version, "--net", "resnet18") == 2
    assert "does not fit resnet18 at 16 px: features.conv1.weight is missing" in read_error_line(capsys)


def test_tensorboard_option_writes_events(tmp_path: Path, command: Command) -> None:
    draw_images(tmp_path / "squares")
    train = ["train", "--data", tmp_path / "squares", "--size", 16, "--epochs", 2]
    assert command(*train, "--out", tmp_path / "run", "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    history = checkpoint.load_checkpoint(tmp_path / "run").metadata["progress"]["history"]
    loss_events = events.Scalars("loss")
    assert [(event.step, event.value) for event in loss_events] == [
        (epoch["epoch"], pytest.approx(epoch["loss"])) for epoch in history
    ]
    assert command(*train, "--out", tmp_path / "plain") == 0
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_missing_tensorboard_error_names_the_package(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    draw_images(tmp_path / "squares")
    train = ["train", "--data", tmp_path / "squares", "--size", 16, "--epochs", 1]
    assert command(*train, "--out", tmp_path / "run", "--tensorboard") == 2
    assert "--tensorboard needs the package: pip install tensorboard" in read_error_line(capsys)


def test_train_help_lists_every_network(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "--help") == 0
    assert set(NETS) <= set(re.findall(r"[a-z0-9_]+", capsys.readouterr().out))


def test_export_measures_accuracy_on_given_data(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "squares", "green", "red")
    draw_images(tmp_path / "others [new]", "green", "red", count=10, seed=1)
    train = ["train", "--data", tmp_path / "squares", "--out", tmp_path / "run", "--size", 16, "--epochs", 1]
    assert command(*train) == 0
    (tmp_path / "squares").rename(tmp_path / "gone")
    add_to_repository(build_model(), tmp_path / "zoo", "animals")
    out = tmp_path / "zoo" / "squares" / "1"
    assert command("export", tmp_path / "run", "--out", out, "--data", tmp_path / "others [new]") == 0
    assert (tmp_path / "zoo" / "default").read_text() == "animals\n"  # the first model stays the default
    assert "of 2 images (others [new], validation)" in " ".join(capsys.readouterr().out.split())
    contract = Engine.load(out / "model.onnx", provider="cpu", threads=1).contract
    assert contract.accuracy is not None
    assert (contract.accuracy.data, contract.accuracy.images) == ("others [new], validation", 2)
    assert contract.training.data == "squares"


def test_train_names_and_skips_unreadable_images(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw_images(tmp_path / "my [red] squares")
    (folder / "red" / "[blue].png").write_text("not an image")
    train = ["train", "--data", folder, "--out", tmp_path / "run", "--size", 16, "--epochs", 1]
    assert command(*train) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "skipped red/[blue].png: the bytes are not an image" in output
    assert "my [red] squares: 3 labels, 12 images to train on, 3 held out, 0 to test" in output


# --- Ctrl-C --------------------------------------------------------------------------------------

EPOCHS = 30
"""Epochs that take over a second, so that the signal arrives during the run."""


def run_interrupted(arguments: list[str]) -> tuple[int, str]:
    """Run `fovea` in its own process and interrupt it after the first epoch; return exit code and output."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as in this process: more threads would round sums differently
    with subprocess.Popen(
        [sys.executable, "-m", "fovea", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = ""
        while "epoch   1/" not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        process.send_signal(signal.SIGINT)
        output += process.communicate(timeout=300)[0]
    return process.returncode, output


@pytest.mark.long
def test_resume_after_ctrl_c_gives_the_same_weights(tmp_path: Path, command: Command) -> None:
    source = draw_images(tmp_path / "squares", "blue", "red", count=4)
    resumed_run, uninterrupted_run = tmp_path / "broken", tmp_path / "unbroken"
    train = ["train", "--data", str(source), "--size", "16", "--epochs", str(EPOCHS)]
    code, output = run_interrupted([*train, "--out", str(resumed_run)])
    assert code == 130
    stopped_checkpoint = checkpoint.load_checkpoint(resumed_run)
    step = stopped_checkpoint.metadata["progress"]["step"]
    assert 1 <= step < EPOCHS
    assert f"stopped at step {step}; --resume continues from there" in output
    assert "Traceback" not in output
    data = load_dataset(source, size=16, validation=0.1, seed=0)
    assert 0 <= measure_accuracy(stopped_checkpoint.build_net(), data.validation) <= 1

    assert command(*train, "--out", resumed_run, "--resume") == 0
    assert command(*train, "--out", uninterrupted_run) == 0
    assert read_weights(resumed_run) == read_weights(uninterrupted_run)
    assert checkpoint.load_checkpoint(resumed_run).metadata["progress"]["step"] == EPOCHS
    assert sorted(path.name for path in resumed_run.iterdir()) == [
        "index.json",
        "pixels.u8",
        "report.html",
        "resume.safetensors",
        "weights.json",
        "weights.safetensors",
    ]


# --- refused calls: one error line, exit code 2 --------------------------------------------------


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the images `squares` and a `run` of one epoch on them."""
    folder = tmp_path_factory.mktemp("trained")
    draw_images(folder / "squares")
    subprocess.run(
        [sys.executable, "-m", "fovea", *make_training_arguments(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def make_training_arguments(folder: Path) -> list[str]:
    """Return the training arguments for the images and the run in `trained_folder`."""
    return f"train --data {folder}/squares --out {folder}/run --size 16 --epochs 1".split()


def test_train_does_not_overwrite_an_existing_run(
    trained_folder: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained_folder / "run" / WEIGHTS_FILE).read_bytes()
    assert command(*make_training_arguments(trained_folder)) == 2
    assert "holds a run already; pass --resume to continue it, or another --out" in read_error_line(capsys)
    assert (trained_folder / "run" / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize("change", [["--epochs", "2"], ["--seed", "1"], ["--validation", "0.3"]])
def test_resume_with_another_recipe_is_refused(
    trained_folder: Path, command: Command, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    assert command(*make_training_arguments(trained_folder), *change, "--resume") == 2
    assert "holds a run with another " in read_error_line(capsys)


@pytest.mark.parametrize("content", ["", "red, green and blue\n" * 100])
def test_unusable_data_file_is_refused(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "set.tar").write_text(content)
    assert command("train", "--data", tmp_path / "set.tar", "--out", tmp_path / "run") == 2
    assert "neither a folder nor a tar archive" in read_error_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seed", str(2**32)], ["--validation", "0.9"]])
def test_options_outside_their_bounds_are_refused(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert command("train", "--data", tmp_path, "--out", tmp_path / "run", *arguments) == 2
    assert f"'{arguments[0]}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_export_without_a_checkpoint_is_refused(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("export", tmp_path / "run", "--out", tmp_path / "zoo" / "squares" / "1") == 2
    assert "`fovea train --out" in read_error_line(capsys)


def test_export_path_without_name_and_version_is_refused(
    trained_folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("squares", "my squares/1", ".squares/1", "squares/new"):
        assert command("export", trained_folder / "run", "--out", tmp_path / place) == 2
        assert (
            "cannot hold a model: the path must end in <name>/<number>, such as zoo/pets/1"
            in read_error_line(capsys)
        )
        assert not (tmp_path / place).exists()


def test_export_with_data_of_other_labels_is_refused(
    trained_folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "other", "blue", "red")
    out = tmp_path / "zoo" / "squares" / "1"
    assert command("export", trained_folder / "run", "--out", out, "--data", tmp_path / "other") == 2
    assert "the checkpoint has labels" in read_error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "15"], "size 15 px: the networks take 16 to 384"),
        (["--size", "385"], "size 385 px: the networks take 16 to 384"),
        (["--net", "vgg"], "there is no network 'vgg'; choose one of cnn"),
    ],
)
def test_bad_network_or_size_is_refused_before_reading_data(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", *arguments) == 2
    assert message in read_error_line(capsys)


# --- reading of data, and `--minutes` ------------------------------------------------------------


def test_train_describes_data_before_first_epoch(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "squares", tmp_path / "run"
    for seed, (part, count) in enumerate((("Training", 8), ("valid", 4), ("Test", 2))):
        draw_images(source / part, count=count, seed=seed)
    (source / "Training" / "red" / "notes.txt").write_text("no image")
    (source / "Training" / "red" / "broken.png").write_text("no image")
    (source / "valid" / "@eaDir").mkdir()
    (source / "valid" / "@eaDir" / "0.png").write_text("no image")
    assert command("train", "--data", source, "--out", run, "--size", 16, "--epochs", 1) == 0
    output = " ".join(capsys.readouterr().out.split())
    for line in (
        "squares: 3 labels, 24 images to train on, 12 held out, 6 to test",
        "45 files found: 42 images used, 1 unreadable, 2 left out",
        "labels are the folders' names: blue, green, red",
        "parts: Training/: 24 images to train on; valid/: 12 images held out; Test/: 6 images to test",
        "left out 1 file *.txt: the bytes are not an image of a known format (Training/red/notes.txt)",
        "left out 1 file in @eaDir/: a hidden file or a system file (valid/@eaDir/0.png)",
    ):
        assert line in output
        assert output.index(line) < output.index("epoch 1/1")
    assert (run / "left-out.txt").read_text().splitlines() == [
        "Training/red/broken.png: the bytes are not an image of a known format; send one of "
        f"{', '.join(supported_formats())}",
        "Training/red/notes.txt: the bytes are not an image of a known format",
        "valid/@eaDir/0.png: a hidden file or a system file",
    ]
    report = (run / "report.html").read_text()
    assert "45 files found: 42 images used" in report
    assert "<td class='wrap'>*.txt</td>" in report
    inventory = checkpoint.load_checkpoint(run).metadata["inventory"]
    assert (inventory["found"], [group["files"] for group in inventory["left_out"]]) == (45, [1, 1])


def test_export_reads_data_as_training_did(tmp_path: Path, command: Command) -> None:
    folder = draw_images(tmp_path / "squares", "Cat", "cat", "dog", colours=("red", "red", "blue"), count=6)
    lines = [f"{label}/{number}.png,{label}" for label in ("Cat", "cat", "dog") for number in range(6)]
    (folder / "set.csv").write_text("\n".join(["where,what", *lines]))
    train = ["train", "--data", folder / "set.csv", "--size", 16, "--epochs", 1]
    choices = ["--path-column", "where", "--label-column", "what", "--label-case", "merge"]
    assert command(*train, *choices, "--out", tmp_path / "run") == 0
    assert command("export", tmp_path / "run", "--out", tmp_path / "zoo" / "pets" / "1") == 0
    contract = Engine.load(tmp_path / "zoo" / "pets" / "1" / "model.onnx", provider="cpu", threads=1).contract
    assert contract.labels == ("cat", "dog")


def test_data_folder_with_non_utf8_name_is_trained_and_served(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the contract nor the metrics can hold such a name."""
    folder = draw_images(tmp_path / os.fsdecode(b"sq\xff"), "blue", "red", count=8)
    (folder / "red" / os.fsdecode(b"\xfe.png")).write_text("no image")
    run, zoo = tmp_path / os.fsdecode(b"r\xff"), tmp_path / "zoo"
    train = ["train", "--data", folder, "--size", 16, "--epochs", 1, "--out", run]
    assert command(*train, "--export", zoo / "squares" / "1") == 0
    contract = Engine.load(zoo / "squares" / "1" / "model.onnx", provider="cpu", threads=1).contract
    assert contract.training.data == "sq?"
    json.dumps(contract.training.command, ensure_ascii=False).encode()
    with Server(FOVEA_MODELS=str(zoo)) as server:
        image = (folder / "blue" / "0.png").read_bytes()
        assert server.client.post("/v1/classify", content=image).status_code == 200
        assert server.client.get("/v1/models/squares").status_code == 200
        assert 'label="blue"' in server.client.get("/metrics").text


def test_resumed_minutes_run_keeps_its_epochs(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "squares")
    train = ["train", "--data", tmp_path / "squares", "--size", 16, "--out", tmp_path / "run"]
    assert command(*train, "--minutes", 0.1) == 0
    output = " ".join(capsys.readouterr().out.split())
    recipe = checkpoint.load_checkpoint(tmp_path / "run").metadata["recipe"]
    noun = "epoch" if recipe["epochs"] == 1 else "epochs"
    assert f"6 seconds: {recipe['epochs']} {noun} of " in output
    before = read_weights(tmp_path / "run")
    for options in ([], ["--minutes", 5]):
        assert command(*train, *options, "--resume") == 0
        assert checkpoint.load_checkpoint(tmp_path / "run").metadata["recipe"] == recipe
        assert read_weights(tmp_path / "run") == before
    assert command(*train, "--minutes", 5, "--epochs", 2, "--resume") == 2
    capsys.readouterr()
    assert command(*train, "--minutes", 5, "--epochs", 2) == 2
    assert "--epochs and --minutes exclude each other" in read_error_line(capsys)
