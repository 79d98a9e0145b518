"""Converters in a child process: limits, refusals and missing packages."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.conversion import Limits, run_converter
from tests.servers import ROOT, wait_until

WriteModule = Callable[[str], str]

FRAME = """
from fovea.export.importer.sources.child import run_child
from fovea.export.importer.foreign_model import ImportRefused

def convert(*arguments):
    {body}

run_child(convert)
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        (tmp_path / "own_converter.py").write_text(FRAME.format(body=body))
        return "own_converter"

    return write


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "limits", "message"),
    [
        ("raise ImportRefused('it has no head')", Limits(), "^it has no head$"),
        ("import no_such_package.inner", Limits(), "of pets needs no_such_package: pip install no_such_pack"),
        ("raise KeyError('x')", Limits(), "of pets failed: KeyError: 'x'"),
        ("import os; os._exit(9)", Limits(), "of pets failed: exit code 9"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Limits(), "of pets was ended by SIGSEGV"),
        ("import time; time.sleep(600)", Limits(seconds=3), "of pets took more than 3 s and was ended"),
        (
            "data = bytearray(1 << 30); import time; time.sleep(600)",
            Limits(memory_bytes=600_000_000),
            r"of pets needed \d\.\d GB of memory, more than the limit of 0.6 GB",
        ),
    ],
)
def test_end_of_a_converter_is_one_sentence(
    write_module: WriteModule, body: str, limits: Limits, message: str
) -> None:
    module = write_module(body)
    start = time.monotonic()
    with pytest.raises(ImportRefused, match=message):
        run_converter(module, ["a"], what="pets", limits=limits)
    assert time.monotonic() - start < 300


@pytest.mark.long
def test_converter_gets_its_arguments_and_no_network(write_module: WriteModule, tmp_path: Path) -> None:
    body = (
        "import os, pathlib; "
        "pathlib.Path(arguments[0]).write_text(arguments[1] + os.environ['HF_HUB_OFFLINE'])"
    )
    module = write_module(body)
    run_converter(module, [tmp_path / "out", "b"], what="pets")
    assert (tmp_path / "out").read_text() == "b1"


@pytest.mark.long
def test_modules_in_the_current_folder_are_not_imported(
    write_module: WriteModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "difflib.py").write_text("import pathlib; pathlib.Path('exploded').touch()")
    monkeypatch.chdir(folder)
    run_converter(write_module("import difflib; difflib.SequenceMatcher"), [], what="pets")
    assert not (folder / "exploded").exists()


@pytest.mark.long
def test_old_keras_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keras.py").write_text("__version__ = '3.11.3'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportRefused, match=r"^keras 3\.11\.3 can run .*; install keras 3\.12 or newer"):
        run_converter(
            "fovea.export.importer.sources.keras_child", ["convert", "pets.keras", "out"], what="pets"
        )


IMPORT = """
from fovea.export.importer.sources.conversion import run_converter
run_converter("own_converter", [], what="pets")
"""


@pytest.mark.long
def test_converter_ends_with_a_killed_import(write_module: WriteModule, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    write_module(
        f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); "
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", IMPORT], cwd=ROOT)
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not is_running(int(pid_file.read_text())))


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
