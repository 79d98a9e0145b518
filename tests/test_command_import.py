"""`fovea import` on the command line, and the imported models in the service."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from fovea.service.artifact.contract import Interpolation, Task
from fovea.service.artifact.geometry import CropStep, Fit, ResizeStep
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.inference.engine import Engine
from tests.commands import Command, read_error_line
from tests.export.classifiers import build_classifier, prepare_imagenet, run_onnx, softmax
from tests.export.importer.test_graph_output import append_steps, make_step
from tests.export.importer.test_input_forms import build_with_switch
from tests.export.importer.test_labelled_images import COLOURS, build_colour_model, draw_labelled_images
from tests.export.importer.test_output_choice import NAMES, build_zip_map
from tests.export.importer.test_pipeline import build_batch_mean
from tests.export.imports import make_labels
from tests.graphs import add_to_repository, build_model
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server

pytestmark = pytest.mark.long

IMAGES = {
    "a.jpg": make_jpeg(90, 70, 1),
    "b.png": encode_image(draw_picture(61, 130, 3), "PNG"),
    "c.jpg": make_jpeg(400, 300, 2),
}


def write_import_files(folder: Path, labels: list[str] | None = None, **options: object) -> list[object]:
    """Write a graph and its labels; return the arguments of the command."""
    graph = build_classifier(**options)  # type: ignore[arg-type]  # its own options
    (folder / "foreign.onnx").write_bytes(graph.SerializeToString())
    (folder / "labels.txt").write_text("\n".join(labels or make_labels(5)))
    arguments = ["--labels", folder / "labels.txt", "--name", "thing", "--out", folder / "zoo"]
    return ["import", folder / "foreign.onnx", *arguments]


def test_import_output_lists_every_fact_of_the_model(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*write_import_files(tmp_path, batch=1, shape=[1, 8]), "--preset", "imagenet"]
    assert command(*arguments) == 0
    output = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in output.splitlines() if "  " in line)
    assert {name: value.strip() for name, value in facts.items()} == {
        "input": "image: float32, 1 x 3 x 16 x 16",
        "layout": "nchw (three channels on axis 1)",
        "size": "16 x 16 (the graph's own)",
        "arithmetic": "float32",
        "batch": "any size (the file says 1; made dynamic and verified at 1, 2 and 3)",
        "output": "scores (the only one)",
        "values": "5 logits (measured by running the graph)",
        "task": "multiclass (assumed from logits; --task overrides it)",
        "labels": "5, from 'label 0' to 'label 4'",
        "normalise": "RGB, (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) "
        "(preset imagenet: torchvision's ResNet-50 and others, weights IMAGENET1K_V1)",
        "geometry": "resize cover 18 x 18 bilinear, crop 16 x 16 "
        "(preset imagenet: torchvision's ResNet-50 and others, weights IMAGENET1K_V1)",
        "pixel path": "exact (only --check can show whether fast loses nothing)",
        "check": "not checked on images; --check FOLDER tries this and other recipes on yours",
    }
    for line in (
        "batch 1: probabilities agree with the file's to ",
        "batch 3: ",
        "golden set: 8 images, logits to ",
    ):
        assert line in output
    assert f"wrote {tmp_path / 'zoo' / 'thing' / '1' / 'model.onnx'}, " in output
    assert output.endswith(f"next: fovea serve --models {tmp_path / 'zoo'}\n")
    contract = Engine.load(
        tmp_path / "zoo" / "thing" / "1" / "model.onnx", provider="cpu", threads=1
    ).contract
    assert contract.training.command == "fovea " + " ".join(map(str, arguments))


def test_import_options_reach_the_model(tmp_path: Path, command: Command) -> None:
    arguments = write_import_files(
        tmp_path, layout="nhwc", size=None, count=4, end="sigmoid", labels=make_labels(4)
    )
    arguments += [
        "--mean",
        "1,2,3",
        "--std",
        "4,5,6",
        "--scale",
        "1/2",
        "--bgr",
        "--resize",
        "40",
        "--crop",
        "24x20",
    ]
    arguments += [
        "--interpolation",
        "lanczos",
        "--task",
        "multilabel",
        "--layout",
        "nhwc",
        "--output",
        "scores",
        "--default",
    ]
    assert command(*arguments) == 0
    engine = Engine.load(tmp_path / "zoo" / "thing" / "1" / "model.onnx", provider="cpu", threads=1)
    geometry = engine.contract.input
    assert geometry.steps == (ResizeStep(Fit.COVER, 40, 40, Interpolation.LANCZOS), CropStep(24, 20))
    assert engine.contract.task is Task.MULTILABEL
    assert (tmp_path / "zoo" / "default").read_text() == "thing\n"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)
    values = (pixels[..., ::-1] / 2 - np.array([1, 2, 3])) / np.array([4, 5, 6])
    expected = run_onnx(
        build_classifier(layout="nhwc", size=None, count=4, end="sigmoid"), values.astype(np.float32)
    )
    assert np.abs(engine.run(pixels) - expected).max() <= 1e-5


def test_geometry_option_reaches_the_model_and_the_report(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "resize stretch 20 x 20 bilinear no-antialias, crop 16 x 16 floor"
    assert command(*write_import_files(tmp_path), "--preset", "clip", "--geometry", text) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"geometry    {text} (--geometry)" in lines
    reason = "a resize without antialiasing reads single pixels of the full image"
    assert f"pixel path  exact (fast is the same here: {reason})" in lines
    path = tmp_path / "zoo" / "thing" / "1" / "model.onnx"
    contract = Engine.load(path, provider="cpu", threads=1).contract
    assert format_steps(contract.input.steps) == text


def test_second_import_adds_version_and_keeps_default(tmp_path: Path, command: Command) -> None:
    add_to_repository(build_model(), tmp_path / "zoo", "first")
    arguments = [*write_import_files(tmp_path), "--preset", "clip", "--stretch"]
    assert command(*arguments) == command(*arguments) == 0
    assert (tmp_path / "zoo" / "default").read_text() == "first\n"  # the first model stays the default
    assert sorted(path.name for path in (tmp_path / "zoo" / "thing").iterdir()) == ["1", "2"]
    contract = Engine.load(
        tmp_path / "zoo" / "thing" / "2" / "model.onnx", provider="cpu", threads=1
    ).contract
    assert (contract.version, [step.step for step in contract.input.steps]) == ("2", ["resize"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the file does not say how to normalise pixels"),
        (["--preset", "imagnet"], "there is no preset 'imagnet'"),
        (["--preset", "clip", "--task", "many"], "--task is 'many'; it takes multiclass, binary, multilabel"),
        (["--preset", "clip", "--layout", "chw"], "--layout is 'chw'; it takes nchw, nhwc"),
        (["--preset", "clip", "--interpolation", "x"], "--interpolation is 'x'; it takes nearest, box"),
        (["--preset", "clip", "--check", "nowhere"], "--check nowhere is not a folder"),
        (
            ["--preset", "clip", "--geometry", "warp 3"],
            "--geometry: a step is 'warp 3'; steps begin with resize",
        ),
        (["--preset", "clip", "--geometry", "pad 16"], "--geometry: pad 16 x 16 needs a smaller image"),
        (
            ["--preset", "clip", "--geometry", "crop 24"],
            "--geometry ends with 24 x 24 pixels; the graph takes 16",
        ),
    ],
)
def test_invalid_import_call_ends_with_one_error_line(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*write_import_files(tmp_path), *arguments) == 2
    assert message in read_error_line(capsys)
    assert not (tmp_path / "zoo").exists()


def test_missing_import_options_are_listed_with_an_example(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("import") == 2
    message = read_error_line(capsys)
    assert message.startswith("fovea: `fovea import` needs a source, such as: fovea import model.onnx")
    (tmp_path / "model.onnx").write_bytes(build_classifier(size=None).SerializeToString())
    (tmp_path / "labels.txt").write_text("\n".join(make_labels(5)))
    assert command("import", tmp_path / "model.onnx", "--name", "thing", "--out", tmp_path / "zoo") == 2
    message = read_error_line(capsys)
    for part in (
        "needs --labels; the input 'image', any x 3 x any x any, takes images of any size",
        "--preset (imagenet, keras-mobilenet",
        "--mean and --std",
        "one of --resize and --stretch",
    ):
        assert part in message
    example = message.partition("; such as: fovea ")[2].split()
    assert example[-6:] == ["--labels", "labels.txt", "--crop", "224", "--preset", "imagenet"]
    arguments = [tmp_path / part if part == "labels.txt" else part for part in example]
    assert command(*arguments) == 0
    assert command("import", tmp_path / "model.onnx", "--mean", "0", "--std", "1") == 2
    assert "give --scale 1 or --scale 1/255" in read_error_line(capsys)


def test_name_and_repository_have_defaults(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEA_MODELS", str(tmp_path / "models"))
    arguments = write_import_files(tmp_path)[:4]
    assert command(*arguments, "--preset", "imagenet") == 0
    assert (tmp_path / "models" / "foreign" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize("options", [[], ["--preset", "imagenet"]])
def test_questions_that_need_a_run_are_in_the_same_message(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """The size is open, and sigmoids do not say whether one label or several may be true."""
    arguments = write_import_files(tmp_path, size=None, count=4, end="sigmoid", labels=make_labels(4))
    assert command(*arguments, *options) == 2
    message = read_error_line(capsys)
    assert "takes images of any size: set the size to serve with --crop, such as --crop 224" in message
    assert "give --task multilabel if any number of labels may be true" in message
    assert ("the file does not say how to normalise pixels" in message) == (not options)
    example = message.partition("; such as: fovea ")[2].split()
    assert "--crop 224 --task multilabel" in " ".join(example)
    assert command(*example) == 0


def test_layout_and_size_are_asked_for_together(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_import_files(tmp_path)
    graph = build_classifier()
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [None] * 4))
    (tmp_path / "foreign.onnx").write_bytes(graph.SerializeToString())
    assert command(*arguments, "--preset", "imagenet") == 2
    message = read_error_line(capsys)
    assert "give --layout nchw or --layout nhwc; and set the size to serve with --crop" in message
    assert message.rstrip().endswith("--preset imagenet --layout nchw --crop 224")
    assert command(*arguments, "--preset", "imagenet", "--layout", "nchw", "--crop", "16") == 0


def test_labels_of_the_graph_need_no_option(tmp_path: Path, command: Command) -> None:
    (tmp_path / "foreign.onnx").write_bytes(build_zip_map(NAMES).SerializeToString())
    arguments = ["import", tmp_path / "foreign.onnx", "--name", "thing", "--out", tmp_path / "zoo"]
    assert command(*arguments, "--preset", "imagenet") == 0
    engine = Engine.load(tmp_path / "zoo" / "thing" / "1" / "model.onnx", provider="cpu", threads=1)
    assert engine.contract.labels == tuple(NAMES)


def test_further_inputs_and_tolerance_are_options(tmp_path: Path, command: Command) -> None:
    arguments = write_import_files(tmp_path)
    (tmp_path / "foreign.onnx").write_bytes(build_with_switch().SerializeToString())
    arguments += ["--preset", "imagenet", "--tolerance", "2e-3"]
    assert command(*arguments) == 2
    assert command(*arguments, "--set", "training=false") == 0
    engine = Engine.load(tmp_path / "zoo" / "thing" / "1" / "model.onnx", provider="cpu", threads=1)
    assert engine.contract.golden.logit_tolerance["cpu/float32"] >= 8e-3


@pytest.mark.parametrize(("option", "value"), [("--crop", "0"), ("--size", "0")])
def test_malformed_size_is_called_by_the_first_name_of_its_option(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert command(*write_import_files(tmp_path), "--preset", "imagenet", option, value) == 2
    assert "--crop is '0'; it takes pixels such as 224" in read_error_line(capsys)


def test_uint8_graph_needs_no_normalisation_options(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*write_import_files(tmp_path, dtype="uint8")) == 2
    assert read_error_line(capsys).startswith("fovea: the file does not say how to resize images")
    assert command(*write_import_files(tmp_path, dtype="uint8"), "--stretch", "--interpolation", "box") == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"caf\xe9\ntea\n", "is not UTF-8 text: save it as UTF-8"),
        (b"0,a\n1,b\n3,c\n", "its lines have numbers beside the labels"),
        (b"", "has 0 labels"),
    ],
)
def test_unreadable_labels_end_with_one_error_line(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], labels: bytes, message: str
) -> None:
    arguments = write_import_files(tmp_path)
    (tmp_path / "labels.txt").write_bytes(labels)
    assert command(*arguments, "--preset", "clip") == 2
    assert message in read_error_line(capsys)


def test_changes_to_labels_and_values_are_shown(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_import_files(tmp_path, count=3, end="softmax")
    (tmp_path / "foreign.onnx").write_bytes(
        append_steps(
            build_classifier(count=3, end="softmax"), make_step("Mul", np.float32(100))
        ).SerializeToString()
    )
    (tmp_path / "labels.txt").write_text("id,label\n2,cat\n0,Cat\n1,dog\n")
    assert command(*arguments, "--preset", "clip") == 0
    output = capsys.readouterr().out
    assert "values      3 probabilities times 100 (each row sums to that), divided by it" in output
    assert (
        "labels      3, from 'Cat' to 'cat'; from the column 'label'; in the order of 'id'; 'Cat' and 'cat'"
        in output
    )


def test_check_output_lists_presets_and_unreadable_files(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_import_files(tmp_path, list(COLOURS))
    (tmp_path / "foreign.onnx").write_bytes(build_colour_model().SerializeToString())
    photos = draw_labelled_images(tmp_path / "photos", COLOURS, 3)
    (photos / "red" / "broken.png").write_bytes(b"broken")
    Path(os.fsdecode(os.fsencode(photos) + b"/red/\xff.png")).write_bytes(b"none")
    assert command(*arguments, "--preset", "imagenet", "--check", photos) == 0
    output = capsys.readouterr().out
    assert "top-1 100.00%, top-5 100.00% of 9 images (photos)" in output
    assert "  --preset zero-one         top-1 " in output
    assert f"2 files cannot be read, and were left out:\n  {photos / 'red' / 'broken.png'}: " in output
    assert f"{photos / 'red'}/?.png: " in output


def test_unwritable_repository_ends_with_one_error_line(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_import_files(tmp_path)
    (tmp_path / "zoo").write_text("a file")
    assert command(*arguments, "--preset", "clip") == 2
    assert "cannot write" in read_error_line(capsys)


# --- imported models in the service --------------------------------------------------------------


def test_service_answers_match_reference_pipeline(tmp_path: Path, command: Command) -> None:
    """One request of several images goes to a model with a dynamic batch and to one for single images."""
    assert (
        command(
            *write_import_files(tmp_path, batch=1, shape=[1, 8], end="softmax"),
            "--preset",
            "imagenet",
            "--default",
        )
        == 0
    )
    (tmp_path / "foreign.onnx").write_bytes(build_batch_mean(1).SerializeToString())
    second_import = [
        "import",
        tmp_path / "foreign.onnx",
        "--labels",
        tmp_path / "labels.txt",
        "--name",
        "single",
    ]
    assert command(*second_import, "--out", tmp_path / "zoo", "--preset", "imagenet") == 0
    graphs = {"thing": build_classifier(batch=1, shape=[1, 8], end="softmax"), "single": build_batch_mean(1)}
    with Server(FOVEA_MODELS=str(tmp_path / "zoo"), FOVEA_BATCH_MAX="4") as server:
        for model, graph in graphs.items():
            path = f"/v1/models/{model}/classify"
            reply = server.client.post(
                path, params={"top_k": 0}, files=[("f", item) for item in IMAGES.items()]
            )
            for result, image in zip(reply.json()["results"], IMAGES.values(), strict=True):
                expected = run_onnx(graph, prepare_imagenet(image, 18, 16))[0]
                expected = expected if model == "thing" else softmax(expected)
                predictions = sorted(result["predictions"], key=lambda item: item["index"])
                assert [item["label"] for item in predictions] == make_labels(5)
                assert (
                    np.abs(np.array([item["probability"] for item in predictions]) - expected).max() <= 1e-5
                )
        contract = server.client.get("/v1/models/single/contract").json()
        assert (
            json.loads((tmp_path / "zoo" / "single" / "1" / "report.json").read_text())["model"]
            == contract["name"]
        )
