"""`fovea.load`: the sources that it takes, and models that share a session."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import fovea
from fovea.errors import BadImage, BadRequest, BodyTooLarge, ModelError, SettingsError, TooManyPixels
from fovea.service.artifact.contract import Task
from tests.graphs import add_to_repository, build_model
from tests.hostile import write_truncated, write_without_contract
from tests.pictures import make_jpeg, make_png_header

PHOTO = make_jpeg(120, 90, seed=3)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Return a repository with two versions of `pets`, and `cars`, which is not the default."""
    root = tmp_path / "zoo"
    for version in ("2", "10"):
        add_to_repository(build_model(seed=int(version)), root, "pets", version)
    add_to_repository(build_model(labels=("van", "bus")), root, "cars")
    (root / "default").write_text("pets\n")
    return root


@pytest.mark.parametrize(
    ("source", "version", "expected"),
    [
        ("", None, ("pets", "10")),
        ("", "2", ("pets", "2")),
        ("pets", None, ("pets", "10")),
        ("pets", 2, ("pets", "2")),
        ("pets/2", None, ("pets", "2")),
        ("pets/2/", "2", ("pets", "2")),
        ("cars", None, ("cars", "1")),
        ("cars/1/model.onnx", None, ("cars", "1")),
    ],
)
def test_load_takes_folders_repositories_and_files(
    zoo: Path, source: str, version: str | int | None, expected: tuple[str, str]
) -> None:
    model = fovea.load(f"{zoo}/{source}" if source else zoo, version=version)
    assert (model.name, model.version) == expected
    assert model.classify(PHOTO).model == fovea.load(zoo / source, version=version).classify(PHOTO).model
    assert model.classify(PHOTO).to_dict()["model"] == {"name": expected[0], "version": expected[1]}


def test_configuration_of_the_model_chooses_the_version(zoo: Path) -> None:
    (zoo / "pets" / "config.toml").write_text('versions = ["2"]\n')
    assert fovea.load(zoo / "pets").version == "2"


def test_relative_sources_name_the_model_by_its_folder(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo / "pets")
    assert repr(fovea.load(".")).startswith("<Model pets version 10, 4 labels, on cpu, from '")
    monkeypatch.setenv("HOME", str(zoo))
    assert fovea.load("~/cars").labels == ("van", "bus")


@pytest.mark.parametrize(
    ("source", "version", "sentence"),
    [
        ("nowhere", None, "there is no file or folder .*nowhere; give a model folder"),
        ("pets", "3", "version 3 of pets does not exist; there are 2, 10"),
        ("cars/1/model.onnx", "2", "model.onnx is one file; load the model's folder to choose version 2"),
        ("cars/1", "2", "is one file"),
        ("empty", None, "empty has no <name>/<version>/model.onnx"),
        ("cut.onnx", None, "cut.onnx: "),
        ("foreign.onnx", None, "foreign.onnx: .*contract"),
    ],
)
def test_missing_and_broken_models_are_one_sentence(
    zoo: Path, source: str, version: str | None, sentence: str
) -> None:
    (zoo / "empty").mkdir()
    write_truncated(zoo / "cut.onnx")
    write_without_contract(zoo / "foreign.onnx")
    with pytest.raises(ModelError, match=sentence) as failure:
        fovea.load(zoo / source, version=version)
    assert "\n" not in str(failure.value)


def test_repository_without_default_names_its_models(zoo: Path) -> None:
    (zoo / "default").unlink()
    with pytest.raises(
        ModelError, match=r"has 2 models and no default: cars, pets; load one of them, such as .*cars"
    ):
        fovea.load(zoo)


@pytest.mark.parametrize("source", ["timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_sources_of_import_are_named(source: str) -> None:
    with pytest.raises(ModelError, match="import the model with `fovea import`"):
        fovea.load(source)


def test_wrong_arguments_and_settings_are_refused(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="threads is 0; it must be at least 1"):
        fovea.load(zoo, threads=0)
    with pytest.raises(SettingsError, match="FOVEA_PROVIDER is 'gpu': it must be"):
        fovea.load(zoo, provider="gpu")  # type: ignore[arg-type]
    monkeypatch.setenv("FOVEA_IMAGE_PIXELS", "none")
    with pytest.raises(SettingsError, match="FOVEA_IMAGE_PIXELS"):
        fovea.load(zoo)


def test_limits_are_those_of_the_service(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_IMAGE_PIXELS", "10000")
    monkeypatch.setenv("FOVEA_BODY_BYTES", "4000")
    model = fovea.load(zoo)
    with pytest.raises(TooManyPixels, match=r"image is 120 x 90 px; at most 0\.01 MP"):
        model.classify(PHOTO)
    with pytest.raises(TooManyPixels, match="image is 60000 x 60000 px"):
        model.classify(make_png_header(60_000, 60_000))
    with pytest.raises(BodyTooLarge, match=r"the image has more than 4000 bytes \(FOVEA_BODY_BYTES\)"):
        model.classify(bytes(4001))


def test_models_of_the_same_file_share_a_session(zoo: Path) -> None:
    first, second = fovea.load(zoo), fovea.load(zoo / "pets" / "10" / "model.onnx")
    (zoo / "link.onnx").symlink_to(zoo / "pets" / "10" / "model.onnx")
    assert first._predictor is second._predictor is fovea.load(zoo / "link.onnx")._predictor
    assert fovea.load(zoo, threads=1)._predictor is not first._predictor
    assert fovea.load(zoo, version="2")._predictor is not first._predictor


def test_replaced_file_is_loaded_again(zoo: Path) -> None:
    before = fovea.load(zoo / "cars")
    add_to_repository(build_model(labels=("van", "tram"), seed=5), zoo / "new", "cars")
    os.replace(zoo / "new" / "cars" / "1" / "model.onnx", zoo / "cars" / "1" / "model.onnx")  # noqa: PTH105
    assert fovea.load(zoo / "cars").labels == ("van", "tram")
    assert before.labels == ("van", "bus")


def test_many_threads_get_the_answers_of_one(zoo: Path) -> None:
    model = fovea.load(zoo)
    images = [make_jpeg(64, 48, seed) for seed in range(24)]
    expected = [model.classify(image) for image in images]
    answers: list[list[fovea.Result]] = []

    def classify_all() -> None:
        answers.append([model.classify(image) for image in images])
        answers.append(model.classify(images))

    threads = [threading.Thread(target=classify_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == 12 * [expected]


def test_lists_keep_their_order_and_may_be_any_iterable(zoo: Path, tmp_path: Path) -> None:
    model = fovea.load(zoo, threads=3)
    images = [make_jpeg(64, 48, seed) for seed in range(10)]
    expected = [model.classify(image) for image in images]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    assert model.classify(images) == expected
    assert model.classify(tuple(images)) == expected
    assert model.classify(tmp_path / f"{number}.jpg" for number in range(10)) == expected
    assert model.classify([]) == []


def test_bad_images_are_raised_with_their_place(zoo: Path, tmp_path: Path) -> None:
    model = fovea.load(zoo)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(PHOTO[: len(PHOTO) // 2])
    with pytest.raises(BadImage, match=rf"^{cut}: the JPEG image cannot be decoded"):
        model.classify(cut)
    with pytest.raises(BadImage, match=rf"^images\[1\] \({cut}\): the JPEG image"):
        model.classify([PHOTO, str(cut)])
    with pytest.raises(BadRequest, match=r"^images\[2\]: the image is empty"):
        model.classify([PHOTO, PHOTO, b""])


def test_errors_are_values_on_request(zoo: Path, tmp_path: Path) -> None:
    model = fovea.load(zoo)
    images: list[fovea.ImageSource] = [
        PHOTO,
        b"",
        tmp_path,
        "nowhere.jpg",
        b"no image",
        PHOTO,
        "https://example.org/cat.jpg",
        "a\0b",
    ]
    outcomes = model.classify(images, on_error="return")
    codes = [None if isinstance(one, fovea.Result) else one.code for one in outcomes]
    assert codes == [
        None,
        "bad_request",
        "unreadable_file",
        "unreadable_file",
        "unsupported_format",
        None,
        "unreadable_file",
        "unreadable_file",
    ]
    for outcome in outcomes:  # the frames of a traceback would keep the images alive
        assert isinstance(outcome, fovea.Result) or outcome.__traceback__ is None
    assert [str(one) for one in outcomes[2:4]] == [
        "the file cannot be read: Is a directory",
        "the file cannot be read: No such file or directory",
    ]
    single = model.classify("nowhere.jpg", on_error="return")
    assert isinstance(single, fovea.FileError)
    assert isinstance(single, OSError)
    assert single.to_dict() == {"code": "unreadable_file", "message": single.message}
    assert model.classify([b"", b""], on_error="return")[1].to_dict()["code"] == "bad_request"


def test_wrong_parameters_are_refused(zoo: Path) -> None:
    model = fovea.load(zoo)
    with pytest.raises(BadRequest, match="top_k is -1; it must be at least 0"):
        model.classify(PHOTO, top_k=-1)
    with pytest.raises(BadRequest, match=r"coverage 0\.7 is not one of 0\.5, 0\.9, 0\.95"):
        model.classify(PHOTO, coverage=0.7)
    with pytest.raises(ValueError, match="on_error is 'ignore'; it must be 'raise' or 'return'"):
        model.classify(PHOTO, on_error="ignore")  # type: ignore[call-overload]


def test_thresholds_of_multilabel_models_select_labels(tmp_path: Path) -> None:
    labels = tuple("abcdefg")
    root = add_to_repository(build_model(Task.MULTILABEL, labels), tmp_path, "tags")
    model = fovea.load(root)
    assert model.contract.thresholds == (0.5,) * 7
    result = model.classify(PHOTO, top_k=0)
    assert result.selected_labels == tuple(one.label for one in result.predictions if one.probability >= 0.5)
    with pytest.raises(
        ValueError, match="all labels are needed, but the result holds 5; classify with top_k=0"
    ):
        _ = model.classify(PHOTO).selected_labels
