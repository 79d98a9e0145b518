"""`fovea classify --out` with `--labels-from`, `--copy-to` and `--move-to`, as a user runs it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import fovea
from fovea.bulk.sorting.sorter import Sorter
from fovea.bulk.table_facts import find_facts_file
from fovea.service.settings import load_settings
from tests.commands import Command, read_error_line
from tests.fovea.bulk.tables import read_table, write_table
from tests.graphs import add_to_repository, build_model
from tests.parsed_page import ParsedPage
from tests.pictures import make_jpeg
from tests.servers import ROOT

FOLDERS = ("ant", "Bee", "cows")
"""Two folders of labels, and one that no label is named after."""


@pytest.fixture
def photos(tmp_path: Path, small_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with four images in each of `FOLDERS`, one of them broken."""
    monkeypatch.setenv("FOVEA_MODELS", str(small_zoo))
    for number in range(12):
        path = tmp_path / "photos" / FOLDERS[number % 3] / f"{number % 4}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(40, 30, seed=number))
    (tmp_path / "photos" / "ant" / "0.jpg").write_bytes(make_jpeg()[:100])
    return tmp_path / "photos"


def classify_images(zoo: Path, folder: Path) -> dict[str, str]:
    """Return the label of each readable image by its path below the folder, from `fovea.load`."""
    model = fovea.load(zoo)
    paths = sorted(folder.rglob("*.jpg"))
    outcomes = model.classify(list(paths), on_error="return")
    return {
        str(path.relative_to(folder)): outcome.label
        for path, outcome in zip(paths, outcomes, strict=True)
        if isinstance(outcome, fovea.Result)
    }


def read_folders(folder: Path) -> dict[str, list[bytes]]:
    """Return the contents of the files in each sub-folder."""
    return {
        one.name: sorted(path.read_bytes() for path in one.iterdir())
        for one in sorted(folder.iterdir())
        if one.is_dir()
    }


def expect_folders(photos: Path, labels: dict[str, str]) -> dict[str, list[bytes]]:
    """Return what `read_folders` returns for the sorted images."""
    return {
        label: sorted((photos / name).read_bytes() for name, one in labels.items() if one == label)
        for label in sorted(set(labels.values()))
    }


def test_folder_is_compared_with_its_names_in_one_command(
    command: Command, photos: Path, small_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = classify_images(small_zoo, photos)
    measured = {name: label for name, label in labels.items() if not name.startswith("cows/")}
    hits = sum(name.split("/")[0].lower() == label for name, label in measured.items())
    assert command("classify", photos, "--out", tmp_path / "table.csv", "--labels-from", "folders") == 0
    text = capsys.readouterr().out
    page = ParsedPage((tmp_path / "report.html").read_text())
    for shown_text in (text, page.text):
        assert f"{hits / 7:.2%}" in shown_text
        assert "7 images" in shown_text
        assert "1 image without an answer (1 bad_image)" in shown_text
        assert "cows: 4 images without a true label; the nearest label is 'cow'" in shown_text
    assert f"wrote {tmp_path / 'report.html'}" in text
    assert len(page.find_tags("img")) == 7 - hits
    assert "small version 1" in page.text
    assert len(read_table(tmp_path / "table.csv")) == 12


def test_only_selected_rows_are_compared_and_sorted(
    command: Command, photos: Path, small_zoo: Path, tmp_path: Path
) -> None:
    labels = classify_images(small_zoo, photos)
    label = min(labels.values())
    condition, report = f"label == '{label}' or error is not null", tmp_path / "reports" / "some.html"
    arguments = ("classify", photos, "--out", tmp_path / "table.jsonl", "--where", condition)
    options = ("--labels-from", "folders", "--report", report, "--copy-to", tmp_path / "sorted")
    assert command(*arguments, *options) == 0
    expected = expect_folders(photos, labels)
    assert len(expected) > 1
    assert read_folders(tmp_path / "sorted") == {label: expected[label]}
    assert condition in ParsedPage(report.read_text()).text
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("option", ["--copy-to", "--move-to"])
def test_images_are_sorted_after_a_dry_run(
    command: Command,
    photos: Path,
    small_zoo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    """The dry run touches no image, and the next run with --resume classifies none again."""
    labels = classify_images(small_zoo, photos)
    expected, before = expect_folders(photos, labels), read_folders(photos)
    arguments = ("classify", photos, "--out", tmp_path / "table.csv", option, tmp_path / "sorted")
    assert command(*arguments, "--dry-run") == 0
    captured = capsys.readouterr()
    lines = [line.split(" -> ") for line in captured.out.splitlines()[1:]]
    assert sorted(source.removeprefix(f"{photos}/") for source, _ in lines) == sorted(labels)
    assert f"11 images would be {'moved' if option == '--move-to' else 'copied'}" in captured.err
    assert read_folders(photos) == before
    assert not (tmp_path / "sorted").exists()
    contents = {target: Path(source).read_bytes() for source, target in lines}

    assert command(*arguments, "--resume") == 0
    assert "is finished already" in capsys.readouterr().out
    assert read_folders(tmp_path / "sorted") == expected
    assert {target: Path(target).read_bytes() for target in contents} == contents
    left = [path for path in photos.rglob("*") if path.is_file()]
    assert len(left) == (1 if option == "--move-to" else 12)

    assert command(*arguments, "--resume") == 0
    assert "copied 0 images" in capsys.readouterr().out or option == "--move-to"
    assert read_folders(tmp_path / "sorted") == expected


def test_images_that_fail_give_exit_code_1(
    command: Command, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("classify", photos, "--out", tmp_path / "table.csv")
    assert command(*arguments) == 0
    (photos / "Bee" / "1.jpg").unlink()
    capsys.readouterr()
    assert command(*arguments, "--resume", "--move-to", tmp_path / "sorted") == 1
    captured = capsys.readouterr()
    assert "moved 10 images into" in captured.out
    assert "1 could not be moved" in captured.out
    assert f"fovea: {photos / 'Bee' / '1.jpg'}: " in captured.err


def test_image_that_is_gone_keeps_no_other_from_being_sorted(
    command: Command, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even if it was named on the command line: the sources are listed again for the archive."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "ant" / "1.jpg", "ant/1.jpg")
    gone = photos / "Bee" / "1.jpg"
    arguments = ("classify", gone, tmp_path / "photos.zip", "--out", tmp_path / "table.csv")
    assert command(*arguments) == 0
    gone.unlink()
    assert command(*arguments, "--resume", "--copy-to", tmp_path / "sorted") == 1
    captured = capsys.readouterr()
    assert "copied 1 image into" in captured.out
    assert f"fovea: {gone}: No such file or directory" in captured.err
    assert sum(map(len, read_folders(tmp_path / "sorted").values())) == 1


def test_images_of_an_archive_are_compared_with_thumbnails_and_copied(
    command: Command, photos: Path, small_zoo: Path, tmp_path: Path
) -> None:
    labels = classify_images(small_zoo, photos)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.write(path, path.relative_to(photos))
    options = ("--labels-from", "folders", "--copy-to", tmp_path / "sorted")
    assert command("classify", tmp_path / "photos.zip", "--out", tmp_path / "table.csv", *options) == 0
    assert read_folders(tmp_path / "sorted") == expect_folders(photos, labels)
    page = ParsedPage((tmp_path / "report.html").read_text())
    hits = sum(
        name.split("/")[0].lower() == label for name, label in labels.items() if not name.startswith("cows/")
    )
    assert len(page.find_tags("img")) == 7 - hits
    assert "no picture" not in page.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--copy-to", "a", "--move-to", "b"], "--copy-to and --move-to exclude each other"),
        (["--dry-run"], "--dry-run shows what --copy-to or --move-to would do"),
        (["--report", "a.html"], "--report needs --labels-from folders"),
        (["--labels-from", "folders", "--report", "."], "--report is the folder ."),
        (["--labels-from", "folders", "--report", "README.md"], "--report is 'README.md'; end the name with"),
        (["--labels-from", "folders", "--report", "report.html"], "report.html exists; replace it with"),
        (["--copy-to", "README.md"], "README.md is no folder"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_any_work(
    command: Command,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "report.html").touch()
    assert command("classify", photos, "--out", tmp_path / "table.csv", *options) == 2
    assert message in read_error_line(capsys)
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize("options", [["--labels-from", "folders"], ["--copy-to", "a"], ["--move-to", "a"]])
def test_options_need_a_table(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert command("classify", photos, *options) == 2
    assert f"{options[0]} needs --out" in read_error_line(capsys)


def test_table_of_another_model_is_refused(
    command: Command, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one whose file has the same labels: the report would name the wrong model."""
    out = tmp_path / "table.csv"
    arguments = ("classify", photos, "--out", out)
    assert command(*arguments) == 0
    other_zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    capsys.readouterr()
    for options in ((), ("--labels-from", "folders"), ("--move-to", tmp_path / "sorted")):
        assert command(*arguments, "--resume", "--models", other_zoo, *options) == 2
        line = read_error_line(capsys)
        assert line.startswith(f"fovea: {out} was made with other options: the SHA-256 of the model file ")
    assert len(list(photos.rglob("*.jpg"))) == 12


@pytest.mark.parametrize("action", [["--labels-from", "folders"], ["--move-to", "sorted"]])
def test_all_labels_are_checked_before_the_first_image_is_moved(
    command: Command,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    action: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "table.csv"
    assert command("classify", photos, "--out", out) == 0
    *rows, last_row = read_table(out)
    write_table(out, [*rows, last_row._replace(label="gnu")])
    capsys.readouterr()
    assert command("classify", photos, "--out", out, "--resume", *action) == 2
    assert f"{out} has the label 'gnu', which the model does not have" in read_error_line(capsys)
    assert len(list(photos.rglob("*.jpg"))) == 12
    assert not (tmp_path / "report.html").exists()


OTHER_OPTIONS = {
    "--top-k 1": "--top-k 5, now 1",
    "--coverage 0.9": "--coverage unset, now 0.9",
    "--where known": "--where unset, now known",
    "--allow-host photos.example.com": "--allow-host unset, now photos.example.com",
}


@pytest.mark.long
def test_finished_table_must_have_the_options_of_the_command(
    command: Command,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "table.csv"
    arguments = ("classify", photos, "--out", out)
    assert command(*arguments) == 0
    capsys.readouterr()

    def refuse(*arguments: object) -> str:
        command_line = ("classify", *arguments, "--out", out, "--resume", "--move-to", tmp_path / "sorted")
        assert command(*command_line) == 2
        return read_error_line(capsys)

    start = f"fovea: {out} was made with other options: "
    end = "; repeat its options, or name another table with --out\n"
    for options, difference in OTHER_OPTIONS.items():
        assert refuse(photos, *options.split()) == f"{start}{difference}{end}"
    assert refuse(photos / "ant") == f"{start}the sources {photos}, now {photos / 'ant'}{end}"
    settings = load_settings()
    limits = {"FOVEA_BODY_BYTES": settings.body_bytes, "FOVEA_IMAGE_PIXELS": settings.image_pixels}
    for name, default in limits.items():
        with monkeypatch.context() as context:
            context.setenv(name, "100000")
            assert refuse(photos) == f"{start}{name} {default}, now 100000{end}"
    assert not (tmp_path / "sorted").exists()
    assert command(*arguments, "--resume", "--copy-to", tmp_path / "sorted") == 0


def test_sources_that_were_moved_need_not_be_named_again(
    command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell no longer finds them for `photos/Bee/*.jpg`."""
    paths = sorted((photos / "Bee").iterdir())
    options = ("--out", tmp_path / "table.csv", "--move-to", tmp_path / "sorted")
    place, calls = Sorter._place, []

    def interrupt(*values: object) -> object:
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place(*values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Sorter, "_place", interrupt)
        assert command("classify", *paths, *options) == 130
    remaining = sorted((photos / "Bee").iterdir())
    assert len(remaining) == 2
    assert command("classify", *remaining[:1], *options, "--resume") == 2
    assert command("classify", *remaining, *options, "--resume") == 0
    assert sum(map(len, read_folders(tmp_path / "sorted").values())) == 4


def test_report_has_the_facts_of_the_table(command: Command, photos: Path, tmp_path: Path) -> None:
    """One of its sources is gone, and not named any more."""
    gone, left = photos / "ant" / "1.jpg", photos / "Bee" / "1.jpg"
    options = ("--out", tmp_path / "table.parquet", "--where", "width > 1")
    assert command("classify", gone, left, *options) == 0
    gone.unlink()
    assert command("classify", left, *options, "--resume", "--labels-from", "folders") == 0
    text = ParsedPage((tmp_path / "report.html").read_text()).text
    metadata = pq.read_schema(tmp_path / "table.parquet").metadata
    for fact in ("small version 1", metadata[b"fovea.digest"].decode(), f"{gone}, {left}", "width > 1"):
        assert fact in text
    assert f"small version 1 on {gone} and 1 more" in text


@pytest.mark.parametrize("name", ["foreign.csv", "foreign.jsonl", "foreign.parquet"])
def test_foreign_table_is_one_sentence(
    command: Command, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Also if the metadata of a table lie beside it."""
    out = tmp_path / name
    assert command("classify", photos, "--out", out) == 0
    out.write_bytes(b"path,camera\n1.jpg,x\n")
    options = ("--resume", "--copy-to", tmp_path / "sorted")
    capsys.readouterr()
    assert command("classify", photos, "--out", out, *options) == 2
    assert f"{out} is no table of `fovea classify`, or it was changed: " in read_error_line(capsys)
    if out.suffix != ".parquet":
        find_facts_file(out).unlink()
        assert command("classify", photos, "--out", out, *options) == 2
        assert read_error_line(capsys) == (
            f"fovea: cannot read the table {find_facts_file(out)}: No such file or directory\n"
        )
    assert not (tmp_path / "sorted").exists()


def test_no_source_is_replaced(
    command: Command,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by the table, nor by the report, nor by another name of the same file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("path,camera\nphotos/ant/1.jpg,x\n")
    (tmp_path / "link.csv").symlink_to("list.csv")
    (tmp_path / "photo.html").write_bytes(make_jpeg())
    (tmp_path / "photos.lnk").symlink_to("photos")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (
        ["list.csv", "--out", "list.csv"],
        ["./list.csv", "photos", "--out", "list.csv"],
        [tmp_path / "list.csv", "photos", "--out", "list.csv"],
        ["link.csv", "photos", "--out", "list.csv"],
        ["photos.lnk/../list.csv", "photos", "--out", "list.csv"],
        ["l*.csv", "photos", "--out", "list.csv"],
        [f"{tmp_path}/**/*.csv", "--out", "list.csv"],
        ["photo.html", "--out", "out.csv", "--labels-from", "folders", "--report", "photo.html"],
        ["photos", "--out", "out.csv", "--labels-from", "folders", "--report", "list.csv"],
        ["photos", "--out", "out.csv", "--labels-from", "folders", "--report", "out.csv"],
        ["photos", "--out", "out.csv", "--labels-from", "folders", "--report", "out.csv-metadata.json"],
        ["photos", "--out", "out.csv", "--labels-from", "folders", "--report", "photos/ant/1.jpg"],
    ):
        assert command("classify", *arguments, "--force") == 2, arguments
        line = read_error_line(capsys)
        assert "is a source" in line or "end the name with .html" in line
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_images_of_an_archive_in_a_list_on_standard_input_are_shown_and_copied(
    command: Command, photos: Path, small_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is read once, and its sources are listed again for the report and for the copies."""
    labels = classify_images(small_zoo, photos)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.write(path, path.relative_to(photos))
    arguments = ("classify", "-", "--out", tmp_path / "table.csv")
    options = ("--labels-from", "folders", "--copy-to", tmp_path / "sorted")
    for resume in ([], ["--resume"]):
        stream = io.BytesIO(f"{tmp_path / 'photos.zip'}\n".encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        assert command(*arguments, *options, *resume) == 0
        assert read_folders(tmp_path / "sorted") == expect_folders(photos, labels)
        page = ParsedPage((tmp_path / "report.html").read_text())
        assert page.find_tags("img")
        assert "no picture" not in page.text
        shutil.rmtree(tmp_path / "sorted")


def test_interrupted_sorting_is_continued(
    command: Command,
    photos: Path,
    small_zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C after the fifth image; the next run with --resume moves the others, and none twice."""
    expected = expect_folders(photos, classify_images(small_zoo, photos))
    arguments = ("classify", photos, "--out", tmp_path / "table.csv", "--move-to", tmp_path / "sorted")
    place, calls = Sorter._place, []

    def interrupt(*values: object) -> object:
        calls.append(values)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return place(*values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Sorter, "_place", interrupt)
        assert command(*arguments) == 130
    assert "fovea: interrupted; moved 5 images into" in capsys.readouterr().err
    assert sum(map(len, read_folders(tmp_path / "sorted").values())) == 5
    assert command(*arguments, "--resume") == 0
    assert read_folders(tmp_path / "sorted") == expected


@pytest.mark.parametrize("option", ["--copy-to", "--move-to"])
def test_file_names_that_are_not_utf8_are_sorted(
    command: Command, photos: Path, small_zoo: Path, tmp_path: Path, option: str
) -> None:
    """The table has them with escapes; two of them have one name."""
    for folder in ("ant", "Bee"):
        (photos / folder / "0.jpg").rename(os.fsdecode(os.fsencode(photos / folder) + b"/caf\xe9.jpg"))
    (photos / "ant" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(make_jpeg(50, 30, seed=99))
    (photos / "ant" / r"caf\xe9.jpg").write_bytes(make_jpeg(40, 30, seed=77))
    expected = expect_folders(photos, classify_images(small_zoo, photos))
    arguments = ("classify", photos, "--out", tmp_path / "table.csv", option, tmp_path / "sorted")
    assert command(*arguments) == 0
    assert read_folders(tmp_path / "sorted") == expected
    assert command(*arguments, "--resume") == 0
    assert read_folders(tmp_path / "sorted") == expected
    assert len(list(photos.rglob("*.jpg"))) == (0 if option == "--move-to" else 13)


def test_everything_works_without_pytorch(photos: Path, small_zoo: Path, tmp_path: Path) -> None:
    """The wheel has neither PyTorch nor ONNX."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "from fovea.cli import main\n"
        "main()\n"
    )
    options = ("--labels-from", "folders", "--copy-to", tmp_path / "sorted")
    paths = ("classify", photos, "--out", tmp_path / "table.csv")
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, (*paths, *options))],
        cwd=ROOT,
        env={**os.environ, "FOVEA_MODELS": str(small_zoo)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()
    assert sum(map(len, read_folders(tmp_path / "sorted").values())) == 11
