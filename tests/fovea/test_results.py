"""Results of a model in this process equal the answers of a real server to the same images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fovea
from fovea.errors import BadRequest, ModelNotFound
from fovea.results import LabelSet
from fovea.service.artifact.contract import Task
from tests.graphs import add_to_repository, build_model
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server

LABELS = tuple("abcdefg")

IMAGES = [
    make_jpeg(120, 90, seed=1),
    encode_image(draw_picture(40, 60), "PNG"),
    encode_image(draw_picture(50, 50).convert("CMYK"), "JPEG"),  # a warning: it has no profile
    encode_image(draw_picture(300, 20), "WEBP"),  # a warning: mostly cropped
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with a model of each task; `animals` is the default, with two versions."""
    root = tmp_path_factory.mktemp("zoo")
    add_to_repository(build_model(labels=LABELS), root, "animals", "1")
    add_to_repository(build_model(labels=LABELS, seed=2), root, "animals", "2")
    add_to_repository(build_model(Task.BINARY, ("no", "yes")), root, "yes-no")
    add_to_repository(build_model(Task.MULTILABEL, LABELS), root, "tags")
    (root / "animals" / "config.toml").write_text('versions = ["1", "2"]\n')
    (root / "default").write_text("animals\n")
    return root


@pytest.fixture(scope="module")
def server(zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo)) as instance:
        yield instance


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[fovea.Client]:
    with fovea.Client(server.url) as instance:
        yield instance


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("animals", {}),
        ("animals", {"top_k": 0, "coverage": 0.9}),
        ("yes-no", {"top_k": 1, "coverage": 0.95}),
        ("tags", {"top_k": 6}),
    ],
)
def test_dict_is_the_reply_of_the_service(
    name: str, options: dict[str, Any], zoo: Path, server: Server, client: fovea.Client
) -> None:
    model = fovea.load(zoo / name)
    replies = []
    for image in IMAGES:
        replies.append(
            server.client.post(f"/v1/models/{name}/classify", params=options, content=image).json()
        )
        result = model.classify(image, **options)
        assert result.to_dict() == replies[-1]
        over_http = client.classify(image, model=name, **options)
        assert over_http.to_dict() == replies[-1]
        assert over_http.predictions == result.predictions
    assert [one.to_dict() for one in model.classify(IMAGES, **options)] == replies
    assert [one.to_dict() for one in client.classify(IMAGES, model=name, **options)] == replies
    assert any("warnings" in reply for reply in replies)


def test_pixels_in_memory_get_the_same_answer_over_http(zoo: Path, client: fovea.Client) -> None:
    model = fovea.load(zoo)
    picture = draw_picture(80, 60)
    transparent = picture.copy()
    transparent.putalpha(picture.convert("L"))
    sources: list[fovea.ImageSource] = [
        picture,
        np.asarray(picture),
        picture.convert("L"),
        transparent,
        Image.fromarray(GREY16),
    ]
    assert model.classify(sources) == client.classify(sources)
    assert model.classify(picture).predictions == model.classify(encode_image(picture, "PNG")).predictions


GREY16 = np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(60, 80)


def test_errors_are_those_of_the_service(zoo: Path, client: fovea.Client) -> None:
    model = fovea.load(zoo)
    images: list[fovea.ImageSource] = [IMAGES[0], b"", b"no image", IMAGES[0][:500], IMAGES[1], "nowhere.jpg"]
    local, remote = model.classify(images, on_error="return"), client.classify(images, on_error="return")
    for ours, theirs in zip(local, remote, strict=True):
        assert type(ours) is type(theirs)
        assert ours.to_dict() == theirs.to_dict()
    for image in images[1:4]:
        with pytest.raises(fovea.RequestError) as ours_raised:
            model.classify(image)
        with pytest.raises(fovea.RequestError) as theirs_raised:
            client.classify(image)
        assert ours_raised.value.to_dict() == theirs_raised.value.to_dict()
        assert ours_raised.value.status == theirs_raised.value.status
        single = client.classify(image, on_error="return")
        assert type(single) is type(ours_raised.value)
    with pytest.raises(BadRequest, match=r"coverage 0\.7 is not one of") as coverage_error:
        client.classify(images[0], coverage=0.7, on_error="return")
    assert coverage_error.value.request_id
    with pytest.raises(BadRequest, match="top_k"):
        client.classify(images[0], top_k=-1)


def test_client_chooses_model_and_version(client: fovea.Client, zoo: Path) -> None:
    image = IMAGES[0]
    assert client.classify(image) == fovea.load(zoo).classify(image)
    assert client.classify(image, model="animals", version=1) == fovea.load(zoo, version=1).classify(image)
    with pytest.raises(ModelNotFound, match="there is no model 'cats 1'"):
        client.classify(image, model="cats 1")
    with pytest.raises(ModelNotFound, match="has no version '7'"):
        client.classify(image, model="animals", version="7")
    with pytest.raises(ValueError, match="version is '1', but model is missing"):
        client.classify(image, version="1")


def test_result_describes_itself(zoo: Path) -> None:
    result = fovea.load(zoo / "animals" / "1").classify(IMAGES[3], coverage=0.95)
    best = result.predictions[0]
    assert (result.label, result.probability) == (best.label, best.probability)
    assert repr(result) == (
        f"<Result {best.label!r} {best.probability:.4f} by animals 1, warnings: mostly_cropped>"
    )
    assert isinstance(result.coverage, LabelSet)
    assert (result.image.format, result.image.width, result.image.height) == ("WEBP", 300, 20)
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result  # noqa: S301
    assert hash(result) == hash(copy.deepcopy(result))


def test_top_never_hides_missing_labels(zoo: Path) -> None:
    model = fovea.load(zoo)
    assert model.classify(IMAGES[0]).top(3) == model.classify(IMAGES[0], top_k=0).predictions[:3]
    assert len(model.classify(IMAGES[0]).top()) == 5
    with pytest.raises(
        ValueError, match="6 labels are needed, but the result holds 5; classify with top_k=6"
    ):
        model.classify(IMAGES[0]).top(6)
    assert len(model.classify(IMAGES[0], top_k=7).top(100)) == 7
    assert len(fovea.load(zoo / "yes-no").classify(IMAGES[0]).top(10)) == 2
    with pytest.raises(ValueError, match=r"top\(-1\)"):
        model.classify(IMAGES[0]).top(-1)
    with pytest.raises(ValueError, match="animals is a multi-class model, which has no thresholds"):
        _ = model.classify(IMAGES[0]).selected_labels


def test_notebooks_show_a_table_and_escape_labels(tmp_path: Path) -> None:
    root = add_to_repository(build_model(labels=("<b>cat</b>", "dog & co")), tmp_path, "a<b")
    html = fovea.load(root).classify(IMAGES[3], coverage=0.5)._repr_html_()
    assert "&lt;b&gt;cat&lt;/b&gt;" in html
    assert "dog &amp; co" in html
    assert "<b>" not in html
    assert "a&lt;b version 1" in html
    assert "mostly_cropped: the model sees only the middle" in html
    assert "the true label is among these in 50% of cases: " in html
    assert html.count("<tr>") == 2
