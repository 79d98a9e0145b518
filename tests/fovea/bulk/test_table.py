"""Tables: their rows are the answers of `fovea.load`, in every format."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

import fovea
from fovea.bulk.rows import Row, create_row
from fovea.bulk.run_options import RunOptions
from fovea.bulk.table_facts import TableFacts, find_facts_file
from fovea.bulk.tables import parquet
from fovea.bulk.tables.choice import choose_format
from fovea.bulk.unfinished_run import find_parts_folder
from fovea.service.artifact.contract import Task
from tests.commands import Command, read_error_line
from tests.fovea.bulk.tables import read_table, write_images
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg

SUFFIXES = [".parquet", ".csv", ".jsonl"]

METADATA = RunOptions(
    sources=("photos", "-"),
    column=None,
    where="known",
    allowed_hosts=("a.example",),
    max_bytes=100,
    max_pixels=200,
    facts=TableFacts("m", "1", "d", 5, None),
    engine="CPU",
    part_size=8,
    fovea="1.2.3",
).to_metadata()


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder with images, broken images, and files that are no images."""
    folder = write_images(tmp_path / "album", 13)
    (folder / "broken.jpg").write_bytes(make_jpeg()[:200])
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "no suffix").write_bytes(make_jpeg())
    (folder / "notes.txt").write_text("no image")
    (folder / 'page, "one"\n.jpg').write_text("no image either, but it is called one")
    (folder / ".hidden.jpg").write_bytes(make_jpeg())
    return folder


def compare_rows(rows: list[Row], expected: list[Row]) -> None:
    """Compare rows; the last bits depend on the batch."""

    def flatten(row: Row) -> list[Any]:
        exact = row._replace(probability=None, known_score=None, probabilities=None)
        return [*exact, row.probability, row.known_score, row.probabilities]

    def blur(row: Row) -> list[Any]:
        *exact, probability, score, probabilities = flatten(row)
        return [
            *exact,
            *(
                None if one is None else pytest.approx(one, rel=1e-5)
                for one in (probability, score, probabilities)
            ),
        ]

    assert list(map(flatten, rows)) == list(map(blur, expected))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_the_answers_of_the_python_api(
    small_zoo: Path,
    album: Path,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    out = tmp_path / "deep" / f"out{suffix}"
    options = ("--models", small_zoo, "--coverage", 0.9, "--top-k", 3)
    nowhere = tmp_path / "nowhere.txt"
    nowhere.symlink_to("further")
    assert command("classify", album, nowhere, "--out", out, *options) == 0
    assert capsys.readouterr().out.startswith(
        f"wrote {out}: 18 images, 4 errors, skipped 1 file without an image in "
    )
    model = fovea.load(small_zoo)
    names = [*sorted(str(path) for path in album.iterdir() if path.is_file() or path.is_symlink())]
    names = [name for name in names if not name.endswith(("notes.txt", ".hidden.jpg"))]
    names = [*sorted([*map(str, album.glob("*/*.jpg")), *names]), str(nowhere)]
    outcomes = model.classify(names, top_k=3, coverage=0.9, on_error="return")
    expected = [create_row(name, outcome) for name, outcome in zip(names, outcomes, strict=True)]
    rows = read_table(out)
    compare_rows(rows, expected)
    assert [row.error for row in rows if row.error] == [
        "bad_image", "unreadable_file", "unsupported_format", "unreadable_file",
    ]  # fmt: skip
    assert not find_parts_folder(out).exists()


def test_parquet_has_types_and_facts(small_zoo: Path, album: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out.parquet"
    assert command("classify", album, "--out", out, "--models", small_zoo, "--coverage", 0.9) == 0
    table = pq.read_table(out)
    assert {field.name: str(field.type) for field in table.schema} == {
        "path": "string",
        "label": "string",
        "probability": "float",
        "labels": "list<element: string>",
        "probabilities": "list<element: float>",
        "label_set": "list<element: string>",
        "known": "bool",
        "known_score": "float",
        "width": "int32",
        "height": "int32",
        "format": "string",
        "error": "string",
        "message": "string",
    }
    facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    digest, run = facts.pop("fovea.digest"), facts.pop("fovea.run")
    assert facts == {
        "fovea.model": "small",
        "fovea.version": "1",
        "fovea.top_k": "5",
        "fovea.coverage": "0.9",
    }
    assert json.loads(run)["sources"] == [str(album)]
    assert command("classify", album, "--out", tmp_path / "out.csv", "--models", small_zoo) == 0
    metadata = json.loads(find_facts_file(tmp_path / "out.csv").read_text())
    assert metadata == json.loads(run) | {"coverage": None}
    assert metadata["digest"] == digest
    assert (metadata["model"], metadata["version"], metadata["top_k"]) == ("small", "1", 5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_value_survives_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [
        Row("a, \"b\"\n'c'.jpg", "l,1", 0.1, ("l,1", 'ä "2"'), (0.1, 1e-30), ("x",), True, -3.5, 1, 2, "PNG"),
        Row("größe/猫.jpg", "x", 1.0, ("x",), (1.0,), (), False, 0.0, 50_000, 1, "JPEG"),
        Row("z", error="bad_image", message='line\nline, "quoted"'),
        Row("x\r=1.png", "a\rb", 0.5, ("a\rb", "\r\n"), (0.5, 0.5), ("\r",), None, None, 1, 1, "PNG"),
        Row("\r", error="bad_image", message="\rline\r"),
    ]
    rows = [
        row._replace(
            probability=None if row.probability is None else round_to_float32(row.probability),
            probabilities=None
            if row.probabilities is None
            else tuple(map(round_to_float32, row.probabilities)),
        )
        for row in rows
    ]
    table_format = choose_format(Path(f"x{suffix}"))
    parts = [tmp_path / f"{number}{suffix}" for number in range(3)]
    for number, part in enumerate(parts):
        with table_format.open_part(part) as writer:
            writer.write_rows(rows if number != 1 else [])
    out = tmp_path / f"out{suffix}"
    table_format.join_parts(parts, out, METADATA)
    assert list(table_format.read_rows(out)) == [*rows, *rows]
    if table_format.has_facts():
        assert table_format.read_metadata(out) == METADATA


def test_other_programs_read_csv_with_line_breaks_in_names(tmp_path: Path) -> None:
    """Each row has its cells, and a name cannot begin a row of its own."""
    names = ["x\r=1.png", "x\n=1.png", "x\r\n=1.png", '"', ","]
    table_format = choose_format(Path("x.csv"))
    with table_format.open_part(tmp_path / "part") as writer:
        writer.write_rows([Row(name, error="bad", message=name) for name in names])
    table_format.join_parts([tmp_path / "part"], tmp_path / "out.csv", METADATA)
    arrow_table = pa_csv.read_csv(
        tmp_path / "out.csv", parse_options=pa_csv.ParseOptions(newlines_in_values=True)
    )
    assert arrow_table["path"].to_pylist() == arrow_table["message"].to_pylist() == names
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["path", *names]
    assert {len(row) for row in rows} == {len(Row._fields)}


def round_to_float32(value: float) -> float:
    rounded: float = pa.scalar(value, pa.float32()).as_py()
    return rounded


@pytest.mark.long
def test_row_groups_are_bounded_and_hold_many_parts(tmp_path: Path) -> None:
    """A reader of Parquet is slow if each part of a thousand rows is a row group of its own."""
    table_format, rows = (
        choose_format(Path("x.parquet")),
        [Row(f"{number:05d}.jpg") for number in range(30_000)],
    )
    parts = [tmp_path / f"{number}" for number in range(3)]
    for part in parts:
        with table_format.open_part(part) as writer:
            for start in range(0, len(rows), 1000):
                writer.write_rows(rows[start : start + 1000])
    assert pq.ParquetFile(parts[0]).num_row_groups > 1
    table_format.join_parts(parts, tmp_path / "out.parquet", METADATA)
    with pq.ParquetFile(tmp_path / "out.parquet") as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert sizes == [parquet._GROUP_ROWS, 90_000 - parquet._GROUP_ROWS]


def test_table_within_a_source_is_no_row(
    small_zoo: Path, album: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEA_MODELS", str(small_zoo))
    out = album / "out.csv"
    assert command("classify", album, "--out", out) == 0
    rows = read_table(out)
    assert command("classify", album, *sorted(album.glob("out*")), "--out", out, "--force") == 0
    assert read_table(out) == rows


def make_empty(folder: Path) -> None:
    folder.mkdir()


def make_without_image(folder: Path) -> None:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("no image")


@pytest.mark.parametrize("make", [make_empty, make_without_image])
def test_source_without_images_is_a_sentence_and_leaves_nothing(
    small_zoo: Path,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
) -> None:
    make(tmp_path / "folder")
    assert command("classify", tmp_path / "folder", "--out", tmp_path / "out.csv", "--models", small_zoo) == 2
    assert read_error_line(capsys) == f"fovea: there are no images in {tmp_path / 'folder'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_where_selects_rows(
    small_zoo: Path, album: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {"all": [], "part": ["--where", "width > 22 or error is not null"]}.items():
        out = tmp_path / f"{name}.jsonl"
        assert command("classify", album, "--out", out, "--models", small_zoo, *options) == 0
    rows = read_table(tmp_path / "all.jsonl")
    selected = [row for row in rows if row.error or (row.width or 0) > 22]
    assert 3 < len(selected) < len(rows)
    assert read_table(tmp_path / "part.jsonl") == selected
    assert f", {len(selected)} selected in " in capsys.readouterr().out


MISTAKES = {
    "--out out.xls": "--out is 'out.xls'; end the name with .parquet, .csv or .jsonl",
    "--out /": "--out is '/'; end the name with .parquet, .csv or .jsonl",
    "--out out.csv --json": "--json is for the terminal, not for --out",
    "--out out.csv --embedding": "--embedding is for the terminal, not for --out",
    "--where known": "--where needs --out",
    "--resume": "--resume needs --out",
    "--force": "--force needs --out",
    "--out folder.csv": "--out is the folder folder.csv; give the name of a file in it",
    "--out file/out.csv": "cannot write file/.out.csv.parts: Not a directory",
    "--out out.csv --coverage 0.91": "coverage 0.91 is not one of 0.5, 0.9, 0.95",
    "--out out.csv photoss": "there is no file or folder 'photoss'",
    "--out out.csv ''": "there is no file or folder ''",
    "--out out.csv --model dog": "there is no model 'dog'; there are small",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistake_is_one_sentence(
    small_zoo: Path,
    album: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert command("classify", album, "--models", small_zoo, *shlex.split(options)) == 2
    assert read_error_line(capsys) == f"fovea: {MISTAKES[options]}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_pyarrow_is_a_sentence(
    small_zoo: Path,
    album: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "fovea.bulk.tables.parquet", raising=False)
    assert command("classify", album, "--models", small_zoo, "--out", "out.parquet") == 2
    assert read_error_line(capsys) == (
        "fovea: Parquet needs pyarrow: pip install 'fovea-serve[bulk]', or end --out with .csv or .jsonl\n"
    )


def test_multi_label_answers_and_all_labels(tmp_path: Path, command: Command) -> None:
    zoo = add_to_repository(build_model(Task.MULTILABEL), tmp_path / "zoo")
    folder = write_images(tmp_path / "album", 5)
    assert command("classify", folder, "--models", zoo, "--top-k", 0, "--out", tmp_path / "out.parquet") == 0
    names = sorted(map(str, folder.rglob("*.jpg")))
    results = fovea.load(zoo).classify(names, top_k=0)
    compare_rows(read_table(tmp_path / "out.parquet"), list(map(create_row, names, results)))
