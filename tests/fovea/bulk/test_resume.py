"""Runs that end early, and are continued: no image twice, none lost, the same bytes."""

from __future__ import annotations

import random
import resource
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fovea.bulk.table_run
from fovea.bulk.table_facts import find_facts_file
from fovea.bulk.unfinished_run import UnfinishedRun, find_parts_folder
from fovea.service.settings import load_settings
from tests.commands import Command, read_error_line
from tests.fovea.bulk.tables import CHUNK_IMAGES, PART_IMAGES, read_table, run_classify, write_images
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg

IMAGES = 5 * PART_IMAGES + 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images, one of them broken."""
    folder = write_images(tmp_path / "photos", IMAGES)
    (folder / "0" / "0003.jpg").write_bytes(make_jpeg()[:200])
    return folder


@pytest.fixture
def classify(command: Command, small_zoo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that classifies the folder with small parts."""
    monkeypatch.setenv("FOVEA_MODELS", str(small_zoo))
    monkeypatch.setattr(fovea.bulk.table_run, "_PART_IMAGES", PART_IMAGES)
    return lambda *arguments: command("classify", folder, *arguments)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Interrupt the run when it begins this part."""
    opened: list[int] = []
    open_part = UnfinishedRun.open_part

    def open_or_stop(run: UnfinishedRun) -> object:
        opened.append(1)
        if len(opened) > parts:
            raise KeyboardInterrupt
        return open_part(run)

    monkeypatch.setattr(UnfinishedRun, "open_part", open_or_stop)


@pytest.mark.parametrize(
    ("suffix", "kills"),
    [
        (".parquet", 1),
        pytest.param(".parquet", 3, marks=pytest.mark.long),
        pytest.param(".csv", 2, marks=pytest.mark.long),
    ],
)
def test_killed_run_is_resumed_with_the_same_bytes(
    classify: Command,
    small_zoo: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    kills: int,
) -> None:
    monkeypatch.setenv("FOVEA_BATCH_MAX", str(CHUNK_IMAGES))
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    assert classify("--out", whole) == 0
    seed = secrets.randbits(32)
    choose = random.Random(seed)  # noqa: S311 - chooses moments
    for kill in range(kills):
        # The processor count of a machine that goes on may be another one.
        runners = {"FOVEA_RUNNERS": str(1 + kill % 3)}
        chunks = choose.randint(0, (IMAGES // CHUNK_IMAGES - 1) // kills)
        process = run_classify(folder, "--out", out, "--resume", zoo=small_zoo, kill_after=chunks, **runners)
        assert process.returncode == -signal.SIGKILL, (seed, process.stderr)
        assert not out.exists()
    capsys.readouterr()
    assert classify("--out", out, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"wrote {out}: {IMAGES} images, ")
    assert captured.err == ""
    assert out.read_bytes() == whole.read_bytes(), seed
    expected = sorted(str(path) for path in folder.rglob("*.jpg"))
    assert [row.path for row in read_table(out)] == expected
    assert not find_parts_folder(out).exists()


def test_interrupted_run_says_how_to_go_on(
    classify: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    with monkeypatch.context() as context:
        stop_after(context, parts=3)
        assert classify("--out", out) == 130
    finished = 3 * PART_IMAGES
    assert capsys.readouterr().err == (
        f"fovea: interrupted; {finished} images are finished and kept; continue with --resume\n"
    )
    assert classify("--out", out) == 2
    assert read_error_line(capsys) == (
        f"fovea: there is an unfinished run for {out}; continue it with --resume, or begin anew with "
        "--force\n"
    )
    assert classify("--out", out, "--resume") == 0
    line = capsys.readouterr().out
    assert line.startswith(f"wrote {out}: {IMAGES} images, {finished} of them finished before, 1 error in ")
    assert len(read_table(out)) == IMAGES
    assert classify("--out", out, "--resume") == 0
    assert capsys.readouterr().out == f"{out} is finished already; --force makes it anew\n"


def test_resumed_run_must_have_the_same_options_and_sources(
    classify: Command,
    command: Command,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.csv"
    with monkeypatch.context() as context:
        stop_after(context, parts=3)
        assert classify("--out", out) == 130
    capsys.readouterr()

    def refuse(*arguments: object) -> str:
        assert command("classify", *arguments, "--out", out, "--resume") == 2
        return read_error_line(capsys)

    start = f"fovea: the unfinished run for {out} had other options: "
    end = "; repeat its options, or begin anew with --force\n"
    assert refuse(folder, "--top-k", 2) == f"{start}--top-k 5, now 2{end}"
    assert refuse(folder, "--coverage", 0.9) == f"{start}--coverage unset, now 0.9{end}"
    assert refuse(folder, "--where", "known") == f"{start}--where unset, now known{end}"
    assert refuse(folder / "0") == f"{start}the sources {folder}, now {folder / '0'}{end}"
    hosts = ("--allow-host", "b.example", "--allow-host", "A.example")
    assert refuse(folder, *hosts) == f"{start}--allow-host unset, now a.example, b.example{end}"
    with monkeypatch.context() as context:
        limit = load_settings().image_pixels
        context.setenv("FOVEA_IMAGE_PIXELS", "1234")
        assert refuse(folder) == f"{start}FOVEA_IMAGE_PIXELS {limit}, now 1234{end}"
    other_zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    assert f"{start}the SHA-256 of the model file " in refuse(folder, "--models", other_zoo)
    added = folder / "0" / "0001a.jpg"
    added.write_bytes(make_jpeg())
    assert refuse(folder).startswith(f"fovea: the sources have changed since the unfinished run for {out}: ")
    added.unlink()
    assert classify("--out", out, "--resume") == 0
    assert len(read_table(out)) == IMAGES


def test_images_added_at_the_end_are_found_by_a_resumed_run(
    classify: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    with monkeypatch.context() as context:
        stop_after(context, parts=2)
        assert classify("--out", out) == 130
    (folder / "9.jpg").write_bytes(make_jpeg())
    assert classify("--out", out, "--resume") == 0
    assert len(read_table(out)) == IMAGES + 1


def test_existing_table_is_replaced_only_by_force(
    classify: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert classify("--out", out) == 2
    assert read_error_line(capsys) == f"fovea: {out} exists; replace it with --force\n"
    with monkeypatch.context() as context:
        stop_after(context, parts=2)
        assert classify("--out", out, "--force") == 130
    assert out.read_text() == "precious"
    assert classify("--out", out, "--resume") == 0
    assert len(read_table(out)) == IMAGES
    assert classify("--out", out, "--force") == 0
    assert len(read_table(out)) == IMAGES
    capsys.readouterr()
    assert classify("--out", out, "--force", "--resume") == 2
    assert read_error_line(capsys).startswith("fovea: --resume continues a run and --force begins it anew")


def test_second_run_for_the_same_table_is_refused(
    classify: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    codes: list[int] = []
    open_part = UnfinishedRun.open_part

    def open_and_run_again(run: UnfinishedRun) -> object:
        if not codes:
            codes.append(classify("--out", out, "--force"))
        return open_part(run)

    monkeypatch.setattr(UnfinishedRun, "open_part", open_and_run_again)
    assert classify("--out", out) == 0
    assert codes == [2]
    assert read_error_line(capsys) == f"fovea: another run is writing {out}; wait for its end\n"
    assert len(read_table(out)) == IMAGES


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Limit the size of files in bytes, so that writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", pytest.param(".jsonl", marks=pytest.mark.long)])
def test_full_disk_is_a_sentence_and_keeps_finished_parts(
    classify: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    assert classify("--out", whole) == 0
    capsys.readouterr()
    with limit_file_size(2000):
        assert classify("--out", out) == 2
    line = read_error_line(capsys)
    assert line == f"fovea: cannot write {find_parts_folder(out) / f'00000{suffix}'}: File too large\n"
    assert not find_parts_folder(out).exists()
    with limit_file_size(int(whole.stat().st_size * 0.9)):
        assert classify("--out", out) == 2
    line = read_error_line(capsys)
    assert line == (
        f"fovea: cannot write {out}: File too large; {IMAGES} images are finished and kept; "
        "continue with --resume\n"
    )
    assert not out.exists()
    assert classify("--out", out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()
    files = {whole, out} | (set() if suffix == ".parquet" else {find_facts_file(whole), find_facts_file(out)})
    assert list_names(tmp_path) == sorted({"photos", *(path.name for path in files)})
