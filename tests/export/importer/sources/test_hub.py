"""Imports from the Hugging Face hub, against a stub of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.hub import HubReference
from fovea.service.inference.engine import Engine
from tests.export.importer.sources.layouts import (
    LABELS,
    PROCESSOR,
    build_hub_graph,
    make_config,
    write_files,
    write_hub_folder,
)
from tests.export.importer.test_refused import move_matrix_outside
from tests.hub import TOKEN, HubRepository, run_commands, run_hub
from tests.pictures import make_jpeg
from tests.servers import Server

COMMIT = "1" * 40
GONE = "http://127.0.0.1:9"
"""Address without a server."""


def load_engine(tmp_path: Path, name: str, version: str = "1") -> Engine:
    return Engine.load(tmp_path / "zoo" / name / version / "model.onnx", provider="cpu", threads=1)


@pytest.mark.long
def test_repository_needs_no_options_and_is_cached(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "hub", **{"onnx/model_fp16.onnx": build_hub_graph(seed=1)})
    with run_hub(house__vit=HubRepository(folder)) as hub:
        (first,) = run_commands(tmp_path, hub.address, ["import", "hf:house/vit"])
        assert (first.code, first.error) == (0, "")
        assert f"source      hf:house/vit@{COMMIT}, onnx/model.onnx\n" in first.output
        assert "licence     apache-2.0\n" in first.output
        downloads = [one for one in hub.requests if one.startswith("GET /house")]
        assert sorted(one.partition(COMMIT)[2] for one in downloads) == [
            "/README.md",
            "/config.json",
            "/onnx/model.onnx",
            "/preprocessor_config.json",
        ]
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:  # `fovea serve` is the second command
        reply = server.client.post("/v1/classify", files={"file": make_jpeg(90, 70, 1)}).json()
    assert {one["label"] for one in reply["predictions"]} <= set(LABELS)
    contract = load_engine(tmp_path, "vit").contract
    assert contract.labels == LABELS
    assert contract.training.data == f"imported: hf:house/vit@{COMMIT}, onnx/model.onnx"
    offline = {"HF_HUB_OFFLINE": "1"}
    command = ["import", "hf:house/vit@main", "--name", "cached"]
    for variables in ({}, offline):
        (result,) = run_commands(tmp_path, GONE, command, **variables)
        assert result.code == 0
        assert "(from the local cache: the hub cannot be reached)" in result.output
    assert load_engine(tmp_path, "cached").contract.labels == LABELS


@pytest.mark.long
def test_every_bad_repository_ends_with_one_sentence(tmp_path: Path) -> None:
    broken = write_hub_folder(tmp_path / "broken", **{"onnx/model.onnx": b"\x08\x08"})
    several = write_files(
        tmp_path / "several",
        {"encoder.onnx": build_hub_graph(), "decoder.onnx": build_hub_graph(), "config.json": make_config()},
    )
    pickle = write_files(tmp_path / "pickle", {"config.json": make_config(), "pytorch_model.bin": b"\x80"})
    text = write_files(
        tmp_path / "text", {"config.json": make_config(architectures=["BertForSequenceClassification"])}
    )
    tagged = write_files(tmp_path / "tagged", {"model.onnx": build_hub_graph()})
    good = write_hub_folder(tmp_path / "good")
    fewer = write_hub_folder(tmp_path / "fewer", **{"config.json": make_config(LABELS[:3])})
    sentences = {
        "hf:house/nothing": "there is no repository house/nothing on the hub, or it is private; for a "
        "private one run `hf auth login` or set HF_TOKEN",
        "hf:house/private": "there is no repository house/private on the hub, or it is private",
        "hf:house/gated": "hf:house/gated is gated: accept its terms at https://huggingface.co/house/gated, "
        "then run `hf auth login` or set HF_TOKEN",
        "hf:house/good@v9": "house/good has no revision 'v9', or not any more; main is at 111111111111",
        "hf:house": "'hf:house' is not hf:OWNER/MODEL",
        "hf:house/several": "hf:house/several has 2 ONNX files: decoder.onnx (",
        "hf:house/pickle": "hf:house/pickle has its weights in a pickle only (pytorch_model.bin), which",
        "hf:house/text": "hf:house/text is a text model (BertForSequenceClassification); Fovea serves image",
        "hf:house/tagged": "hf:house/tagged is an object detector (tag object-detection)",
        "hf:house/broken": "it is cut short",
        "hf:house/fewer": f"config.json of hf:house/fewer@{COMMIT} has 3 labels, the graph gives 5 values",
        "hf:house/short": "onnx/model.onnx of hf:house/short has ",
    }
    with run_hub(
        house__private=HubRepository(good, access="private"),
        house__gated=HubRepository(good, access="gated"),
        house__good=HubRepository(good),
        house__several=HubRepository(several),
        house__pickle=HubRepository(pickle),
        house__text=HubRepository(text),
        house__tagged=HubRepository(tagged, pipeline_tag="object-detection"),
        house__broken=HubRepository(broken),
        house__fewer=HubRepository(fewer),
        house__short=HubRepository(good, wrong_sizes={"onnx/model.onnx": 10**6}),
    ) as hub:
        results = run_commands(tmp_path, hub.address, *(["import", source] for source in sentences))
        downloads = [one for one in hub.requests if one.startswith("GET /house")]
    for (source, sentence), result in zip(sentences.items(), results, strict=True):
        assert sentence in result.error_line, source
    assert not (tmp_path / "zoo").exists()
    for name in ("several/", "pickle/", "tagged/"):  # no weights of a model that cannot be imported
        assert not [one for one in downloads if name in one and not one.endswith(".json")]


@pytest.mark.long
def test_unreachable_hub_says_what_the_cache_lacks(tmp_path: Path) -> None:
    (result,) = run_commands(tmp_path, GONE, ["import", "hf:house/vit@v2"])
    cache = tmp_path / "hf-home" / "hub"
    assert "hf:house/vit@v2: the hub cannot be reached (" in result.error_line
    assert (
        f"the cache {cache} has no config.json and no ONNX file of house/vit at v2; connect"
        in result.error_line
    )


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("files", "options", "problem"),
    [
        ({}, [], "the cache has only config.json; connect"),
        (
            {"onnx/model.onnx": build_hub_graph()},
            ["--file", "fp16"],
            "the cache has no ONNX file 'fp16'; it has onnx/model.onnx (0.0 MB); connect",
        ),
        (
            {"model.safetensors.index.json": INDEX, "model-00001-of-00002.safetensors": b"weights"},
            [],
            "the cache lacks model-00002-of-00002.safetensors; connect",
        ),
    ],
)
def test_unreachable_hub_is_not_blamed_on_the_repository(
    tmp_path: Path, files: dict[str, Any], options: list[str], problem: str
) -> None:
    cache = tmp_path / "hf-home" / "hub" / "models--house--vit"
    write_files(cache, {"refs/main": COMMIT})
    write_files(cache / "snapshots" / COMMIT, {"config.json": make_config(), **files})
    (result,) = run_commands(tmp_path, GONE, ["import", "hf:house/vit", *options])
    assert "hf:house/vit: the hub cannot be reached (" in result.error_line
    assert problem in result.error_line


@pytest.mark.long
def test_token_opens_a_private_repository(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "hub")
    with run_hub(house__private=HubRepository(folder, access="private")) as hub:
        (result,) = run_commands(tmp_path, hub.address, ["import", "hf:house/private"], HF_TOKEN=TOKEN)
    assert result.code == 0
    assert load_engine(tmp_path, "private").contract.labels == LABELS


@pytest.mark.long
def test_cut_download_goes_on_and_files_beside_the_weights_are_fetched(tmp_path: Path) -> None:
    graph = build_hub_graph()
    (matrix,) = [one for one in graph.graph.initializer if one.name == "matrix"]
    content = matrix.raw_data
    folder = write_hub_folder(
        tmp_path / "hub",
        **{
            "onnx/model.onnx": move_matrix_outside(graph, "model.onnx_data"),
            "onnx/model.onnx_data": content,
        },
    )
    with run_hub(house__vit=HubRepository(folder)) as hub:
        hub.cut_files.update(["onnx/model.onnx", "onnx/model.onnx_data"])
        (result,) = run_commands(tmp_path, hub.address, ["import", "hf:house/vit"])
        assert (result.code, hub.cut_files) == (0, set()), result
    assert load_engine(tmp_path, "vit").contract.labels == LABELS


@pytest.mark.long
def test_cut_file_in_the_cache_is_downloaded_again(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "hub")
    with run_hub(house__vit=HubRepository(folder)) as hub:
        (first,) = run_commands(tmp_path, hub.address, ["import", "hf:house/vit"])
        (blob,) = [
            one.resolve() for one in (tmp_path / "hf-home").rglob("model.onnx") if "snapshots" in one.parts
        ]
        blob.write_bytes(blob.read_bytes()[:100])
        (second,) = run_commands(tmp_path, hub.address, ["import", "hf:house/vit"])
    assert (first.code, second.code) == (0, 0), second
    assert load_engine(tmp_path, "vit", "2").contract.labels == LABELS


@pytest.mark.long
def test_revision_that_moves_is_followed_and_recorded(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "hub")
    with run_hub(house__vit=HubRepository(folder)) as hub:
        run_commands(tmp_path, hub.address, ["import", "hf:house/vit"])
        labels = tuple(label.upper() for label in LABELS)
        write_files(folder, {"config.json": make_config(labels), "preprocessor_config.json": PROCESSOR})
        hub.repositories["house/vit"].commit = "2" * 40
        moved, gone = run_commands(
            tmp_path, hub.address, ["import", "hf:house/vit"], ["import", f"hf:house/vit@{COMMIT}"]
        )
    assert f"hf:house/vit@{'2' * 40}" in moved.output
    assert load_engine(tmp_path, "vit", "2").contract.labels == labels
    assert (
        f"house/vit has no revision '{COMMIT}', or not any more; main is at 222222222222" in gone.error_line
    )


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b@", "hf:../b c", "hf:a/b c"])
def test_malformed_references_are_refused(text: str) -> None:
    with pytest.raises(ImportRefused, match="is not hf:OWNER/MODEL or hf:OWNER/MODEL@REVISION"):
        HubReference.parse(text)


def test_reference_has_repository_and_revision() -> None:
    assert HubReference.parse("hf:a/b") == HubReference("a/b", None)
    assert str(HubReference.parse("hf:a/b.c@refs/pr/1")) == "hf:a/b.c@refs/pr/1"
