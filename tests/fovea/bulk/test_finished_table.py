"""Finished tables: other files, damage and changes by other programs are a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fovea.bulk.finished_table import FinishedTable
from fovea.bulk.rows import Row
from fovea.bulk.run_options import RunOptions
from fovea.bulk.table_facts import TableFacts, find_facts_file
from fovea.bulk.tables.choice import choose_format
from fovea.errors import StartError

OPTIONS = RunOptions(
    sources=("photos", "-", "s3://bucket", "*.jpg"),
    column=None,
    where=None,
    allowed_hosts=(),
    max_bytes=100,
    max_pixels=200,
    facts=TableFacts("m", "1", "d", 5, None),
    engine="CPU",
    part_size=8,
    fovea="1.2.3",
)

ROWS = [Row("1.jpg", "cat", 0.5, ("cat",), (0.5,), ("cat",), True, 1.0, 8, 9, "PNG")] * 3

HEADINGS = ",".join(Row._fields).encode() + b"\r\n"

FILES = {
    "empty.csv": (b"", "it has other columns"),
    "foreign.csv": (b"path,camera\n1.jpg,x\n", "line 1: it has other columns"),
    "short.csv": (HEADINGS + b"1.jpg,cat\r\n", "line 2: it has 2 cells, not 13"),
    "text.csv": (HEADINGS + b"1.jpg,cat,much,,,,,,,,,,\r\n", "line 2: could not convert"),
    "boolean.csv": (HEADINGS + b"1.jpg,cat,0.5,,,,TRUE,,,,,,\r\n", "'TRUE' is neither 'true' nor 'false'"),
    "nan.csv": (HEADINGS + b"1.jpg,cat,nan,,,,,,,,,,\r\n", "the probability nan is not between 0 and 1"),
    "list.csv": (HEADINGS + b"1.jpg,cat,0.5,7,,,,,,,,,\r\n", "'7' is no list of this column"),
    "items.csv": (HEADINGS + b"1.jpg,cat,0.5,[7],,,,,,,,,\r\n", "is no list of this column"),
    "bytes.csv": (b"\xff\xfe\0", "can't decode byte"),
    "damaged.jsonl": (b'{"path":"1.jpg"', "line 1: unexpected end of data"),
    "foreign.jsonl": (b'{"path":"1.jpg"}\n', "it is no object with the columns of a table"),
    "list.jsonl": (b"[]\n", "it is no object with the columns of a table"),
    "type.jsonl": (orjson.dumps(Row("1.jpg")._asdict() | {"path": 7}), "'path' is no text"),
    "items.jsonl": (orjson.dumps(Row("1")._asdict() | {"labels": [7]}), "'labels' is no list of texts"),
    "text.jsonl": (orjson.dumps(Row("1")._asdict() | {"labels": "cat"}), "'labels' is no list of texts"),
    "foreign.parquet": (b"PAR1 no table PAR1", ""),
    "empty.parquet": (b"", ""),
}
"""Contents of files, and parts of the sentences."""


def write_table(out: Path) -> FinishedTable:
    table_format = choose_format(out)
    part = out.with_name("part")
    with table_format.open_part(part) as writer:
        writer.write_rows(ROWS)
    table_format.join_parts([part], out, OPTIONS.to_metadata())
    if not table_format.has_facts():
        find_facts_file(out).write_bytes(orjson.dumps(OPTIONS.to_metadata()))
    return FinishedTable(out, table_format)


def fail(function: Callable[[], Any]) -> str:
    """Call a function that fails, and return the sentence."""
    with pytest.raises(StartError) as caught:
        function()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_and_options_are_read_again(tmp_path: Path, suffix: str) -> None:
    table = write_table(tmp_path / f"out{suffix}")
    assert list(table.read_rows()) == ROWS
    assert table.read_options() == OPTIONS
    assert table.is_readable()


@pytest.mark.parametrize("name", FILES)
def test_other_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    content, reason = FILES[name]
    out = tmp_path / name
    table = write_table(out)
    out.write_bytes(content)
    sentence = fail(lambda: list(table.read_rows()))
    assert sentence.startswith(f"{out} is no table of `fovea classify`, or it was changed: ")
    assert reason in sentence
    assert "\n" not in sentence
    assert not table.is_readable()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_damage_is_a_sentence(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    table = write_table(out)
    content = out.read_bytes()
    out.write_bytes(content[: len(content) - 40])
    assert fail(lambda: list(table.read_rows())).startswith(f"{out} is no table of `fovea classify`, or ")
    out.unlink()
    assert fail(lambda: list(table.read_rows())) == (
        f"cannot read the table {out}: No such file or directory"
    )


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        orjson.dumps(OPTIONS.to_metadata() | {"sources": "photos"}),
        orjson.dumps(OPTIONS.to_metadata() | {"sources": [1]}),
        orjson.dumps(OPTIONS.to_metadata() | {"where": 1}),
        orjson.dumps(OPTIONS.to_metadata() | {"digest": None}),
    ],
)
def test_other_metadata_are_a_sentence(tmp_path: Path, metadata: bytes) -> None:
    table = write_table(tmp_path / "out.csv")
    find_facts_file(table.path).write_bytes(metadata)
    assert f"{table.path} is no table of `fovea classify`" in fail(table.read_options)


def test_parquet_of_other_programs_is_a_sentence(tmp_path: Path) -> None:
    table = write_table(tmp_path / "out.parquet")
    whole = pq.read_table(table.path)
    pq.write_table(whole.drop_columns(["width"]), table.path)
    assert "it has other columns" in fail(lambda: list(table.read_rows()))
    pq.write_table(whole.set_column(8, "width", pa.array(["8"] * 3)), table.path)
    assert "it has other columns" in fail(lambda: list(table.read_rows()))
    pq.write_table(whole.replace_schema_metadata(None), table.path)
    assert "it has no metadata of Fovea" in fail(table.read_options)


def test_sources_that_are_gone_need_not_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on standard input, in stores and by patterns must be, and no others are allowed."""
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "out.csv")

    def check(*sources: str) -> None:
        table.check_options(replace(OPTIONS, sources=sources, fovea="2", engine="GPU", part_size=1))

    check("-", "s3://bucket", "*.jpg")
    start = f"{table.path} was made with other options: the sources -, s3://bucket, *.jpg, now "
    for sources in (["-", "s3://bucket"], ["s3://bucket", "*.jpg"], ["-", "s3://bucket", "*.jpg", "new"]):
        assert fail(partial(check, *sources)).startswith(start)
    (tmp_path / "photos").mkdir()
    assert "the sources photos, -, " in fail(partial(check, "-", "s3://bucket", "*.jpg"))
