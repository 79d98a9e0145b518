"""`fovea models`, `show` and `remove` on the command line, compared with what a service does."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from fovea.service.artifact.contract import Contract, Task
from fovea.service.artifact.geometry import Geometry, PixelPath
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.artifact.repository import ModelVersion
from fovea.service.rollout.refusals import Refusals
from tests.commands import Command, make_command, read_error_line
from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.servers import ROOT, Server, wait_until
from tests.tools import SYSTEM_REASON, find_tool
from tests.zoo import get_served_version, get_status

Output = pytest.CaptureFixture[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "100")
    return make_command(monkeypatch)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the repository of the settings: the versions 1, 2 and 10 of one model."""
    root = tmp_path / "zoo"
    for version in ("1", "2", "10"):
        add_to_repository(build_model(), root, version=version)
    monkeypatch.setenv("FOVEA_MODELS", str(root))
    return root


def list_models(command: Command, capsys: Output, *arguments: object) -> dict[str, Any]:
    assert command("models", *arguments, "--json") == 0
    output = capsys.readouterr()
    assert output.err == ""
    return dict(json.loads(output.out))


def get_served(inventory: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one["name"], one["version"]) for one in inventory["models"] if one["served"]}


def get_reasons(inventory: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(one["name"], one["version"]): one["reason"] for one in inventory["models"] if one["reason"]}


def refuse(path: Path, reason: str) -> None:
    version = ModelVersion.from_path(path, path.parent.parent.name, path.parent.name)
    Refusals().refuse(version, reason, lasting=True)


# --- fovea models --------------------------------------------------------------------------------


def test_table_has_a_row_for_each_version(zoo: Path, command: Command, capsys: Output) -> None:
    assert command("models") == 0
    size = (zoo / "small" / "10" / "model.onnx").stat().st_size / 1e6
    heading, *rows, default = capsys.readouterr().out.splitlines()
    assert " ".join(heading.split()) == "model labels input task precision accuracy calibrated size served"
    cells = ["4", "16x16", "multiclass", "float32", "25.00%", "no", f"{size:.1f}", "MB"]
    assert [row.split() for row in rows] == [
        ["small/1", *cells, "no"],
        ["small/2", *cells, "no"],
        ["small/10", *cells, "yes"],
    ]
    assert default == "default model: small"


def test_json_has_the_facts_of_the_contract(command: Command, capsys: Output) -> None:
    inventory = list_models(command, capsys, ROOT / "zoo")
    path = ROOT / "zoo" / "cifar10" / "4" / "model.onnx"
    assert inventory["default_model"] == "cifar10"
    assert [(one["name"], one["version"]) for one in inventory["models"]] == [
        ("cifar10", "3"),
        ("cifar10", "4"),
        ("tiny_vgg", "1"),
    ]
    assert inventory["models"][1] == {
        "name": "cifar10",
        "version": "4",
        "path": str(path),
        "bytes": path.stat().st_size,
        "labels": 10,
        "height": 32,
        "width": 32,
        "task": "multiclass",
        "precision": "int8",
        "accuracy": pytest.approx(0.9114, abs=1e-4),
        "calibrated": True,
        "served": True,
        "reason": None,
        "source": None,
        "licence": "mit",
    }
    assert inventory["models"][0]["precision"] == "float32"


def test_source_and_licence_come_from_the_model_card(zoo: Path, command: Command, capsys: Output) -> None:
    card = '---\nlicense: agpl-3.0\nsource: "hf:a/b@1\\u001b[31m, model.onnx"\n---\n'
    (zoo / "small" / "2" / "README.md").write_text(card)
    assert [one["licence"] for one in list_models(command, capsys)["models"]] == [None, "agpl-3.0", None]
    assert command("models") == 0
    heading, first, second, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[-1] == "licence"
    assert (first.split()[-1], second.split()[-1]) == ("-", "agpl-3.0")
    assert command("show", "small/2") == 0
    output = capsys.readouterr().out
    assert "\nlicence        agpl-3.0\n" in output
    assert "\nsource         hf:a/b@1\\x1b[31m, model.onnx\n" in output
    assert command("show", "small/1") == 0
    assert "\nlicence " not in capsys.readouterr().out


def test_one_file_is_a_list_of_one_model(zoo: Path, command: Command, capsys: Output) -> None:
    inventory = list_models(command, capsys, zoo / "small" / "2" / "model.onnx")
    assert get_served(inventory) == {("small", "2")}
    assert inventory["default_model"] == "small"
    broken = zoo / "broken.onnx"
    broken.write_bytes(b"no model at all")
    inventory = list_models(command, capsys, broken)
    assert get_served(inventory) == set()
    assert get_reasons(inventory) == {("broken", ""): "the file is not an ONNX model"}
    assert inventory["start_error"] == f"{broken}: the file is not an ONNX model"


def damage_versions(zoo: Path) -> None:
    """Add versions 11 to 17 of `small`, none of which can be served, and other models with problems."""
    folders = {number: zoo / "small" / str(number) for number in range(11, 18)}
    for folder in folders.values():
        shutil.copytree(zoo / "small" / "10", folder)
    content = (folders[11] / "model.onnx").read_bytes()
    (folders[11] / "model.onnx").write_bytes(b"no model at all")
    (folders[12] / "model.onnx").write_bytes(content[:-100])
    (folders[13] / "model.onnx").unlink()
    (folders[14] / "model.onnx").unlink()
    os.mkfifo(folders[14] / "model.onnx")
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    onnx.save(model, folders[15] / "model.onnx")
    model.metadata_props.add(key="fovea.contract", value='{"format": 99}')
    onnx.save(model, folders[16] / "model.onnx")
    refuse(folders[17] / "model.onnx", "it flips too many labels")
    for name in ("pinned", "unreadable"):
        add_to_repository(build_model(), zoo, name)
        add_to_repository(build_model(), zoo, name, "2")
    (zoo / "pinned" / "config.toml").write_text('versions = ["1", "7"]')
    (zoo / "unreadable" / "config.toml").write_text("batch_max = 0")
    (zoo / "default").write_text("pinned\n")


def test_versions_that_cannot_be_served_have_reasons(zoo: Path, command: Command, capsys: Output) -> None:
    damage_versions(zoo)
    inventory = list_models(command, capsys)
    reasons = get_reasons(inventory)
    assert get_served(inventory) == {("small", "10"), ("pinned", "1")}
    assert inventory["default_model"] == "pinned"
    assert reasons["small", "11"] == "the file is not an ONNX model"
    assert reasons["small", "12"] == "the ONNX model is cut short"
    assert reasons["small", "13"] == "the folder has no model.onnx"
    assert reasons["small", "14"] == "model.onnx is not a file"
    assert reasons["small", "15"].startswith("the model has no contract; ")
    assert reasons["small", "16"].startswith("format is 99; this version of Fovea reads 1 to ")
    assert reasons["small", "17"] == "it flips too many labels"
    assert reasons["pinned", "7"].endswith("config.toml asks for it, but it does not exist")
    for version in ("1", "2"):
        assert "config.toml: batch_max: " in reasons["unreadable", version]
    assert len(reasons) == 10
    assert command("models") == 0
    output = capsys.readouterr()
    assert output.err == ""
    for (name, version), reason in reasons.items():
        assert f"{name}/{version} is not served: {reason}\n" in output.out


def test_unreadable_files_and_folders_are_rows(zoo: Path) -> None:
    for name in ("locked", "closed"):
        add_to_repository(build_model(), zoo, name)
    (zoo / "small" / "10" / "model.onnx").chmod(0)
    (zoo / "locked" / "1").chmod(0)
    (zoo / "closed").chmod(0)
    inventory = json.loads(run_without_privileges("models", "--json").stdout)
    assert get_served(inventory) == {("small", "2")}
    assert get_reasons(inventory) == {
        ("closed", ""): f"cannot read {zoo}/closed/config.toml: Permission denied",
        ("locked", "1"): "the file cannot be read: Permission denied",
        ("small", "10"): "the file cannot be read: Permission denied",
    }
    zoo.chmod(0)
    process = run_without_privileges("models")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1
    assert "Permission denied" in process.stderr


@pytest.mark.long
def test_list_names_the_versions_that_a_service_serves(zoo: Path, command: Command, capsys: Output) -> None:
    damage_versions(zoo)
    inventory = list_models(command, capsys)
    with Server(FOVEA_MODELS=str(zoo)) as server:
        for one in inventory["models"]:
            status = get_status(server, f"/v1/models/{one['name']}/versions/{one['version']}/classify")
            assert (status == 200) == one["served"], one
        reasons = get_reasons(inventory)
        for refused in server.client.get("/v1/models").json()["refused"]:
            if refused["version"]:
                assert reasons[refused["name"], refused["version"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FOVEA_DEFAULT_MODEL": "other"}, "FOVEA_DEFAULT_MODEL is 'other'; there are small"),
        ({"FOVEA_STRICT": "true"}, "{zoo}/small/11/model.onnx: the file is not an ONNX model"),
    ],
)
def test_start_that_would_fail_is_told(
    zoo: Path,
    command: Command,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    message: str,
) -> None:
    (zoo / "small" / "11").mkdir()
    (zoo / "small" / "11" / "model.onnx").write_bytes(b"no model at all")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    inventory = list_models(command, capsys)
    assert get_served(inventory) == set()
    assert inventory["start_error"] == message.format(zoo=zoo)
    command("models")
    assert f"a start would end with an error: {message.format(zoo=zoo)}\n" in capsys.readouterr().out


def test_repository_without_models_is_told(tmp_path: Path, command: Command, capsys: Output) -> None:
    assert command("models", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path} has no <name>/<version>/model.onnx yet\n"
    assert list_models(command, capsys, tmp_path)["models"] == []
    assert command("models", tmp_path / "nowhere") == 2
    assert "No such file or directory" in read_error_line(capsys)


def test_names_of_any_bytes_are_printed_in_ascii(zoo: Path) -> None:
    (zoo / "small").rename(zoo / os.fsdecode(b"sm\xffll\x1b[31m\xc3\xa4"))
    process = run_fovea("models", PYTHONIOENCODING="ascii")
    assert process.returncode == 0
    assert "sm\\ufffdll\\x1b[31m\\xe4/10" in process.stdout
    assert run_fovea("models", "--json").returncode == 0


def test_narrow_terminal_folds_only_the_name(zoo: Path) -> None:
    (zoo / "small").rename(zoo / ("long-name-" * 6))
    output, _ = read_terminal("models", columns=80)
    lines = re.sub(r"\x1b\[\d*m", "", output).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("multiclass float32" in line for line in lines) == 3
    piped_lines = run_fovea("models", COLUMNS="40").stdout.splitlines()
    assert sum("long-name-" * 6 + "/" in line for line in piped_lines) == 3


def test_commands_load_no_runtime_and_no_training_code(zoo: Path) -> None:
    """The list of a large repository is as fast as the start of Python."""
    code = (
        "import sys, fovea.cli\n"
        "try: fovea.cli.main()\n"
        "except SystemExit: print({'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL'} & sys.modules.keys())"
    )
    for arguments in (["models"], ["show", "small"], ["remove", "small/1", "--yes"]):
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300
        )
        assert process.stdout.splitlines()[-1] == "set()"


def run_fovea(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fovea", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_terminal(*arguments: str, columns: int = 100, keys: bytes = b"") -> tuple[str, int]:
    """Run the command on a terminal that has received `keys`; return its output and its exit code."""
    terminal, child_end = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "fovea", *arguments],
            env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"},
            stdin=child_end,
            stdout=child_end,
            stderr=child_end,
        ) as process:
            os.close(child_end)
            os.write(terminal, keys)
            output = b""
            try:
                while content := os.read(terminal, 65536):
                    output += content
            except OSError as error:  # the command has ended and closed its end
                if error.errno != errno.EIO:
                    raise
        return output.decode(), process.returncode
    finally:
        os.close(terminal)


def run_without_privileges(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command so that the permissions of files count, also for root."""
    prefix = []
    if os.geteuid() == 0:
        if find_tool("setpriv") is None:
            pytest.skip(f"{SYSTEM_REASON}runs the tests as root and has no setpriv")
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    return subprocess.run(
        [*prefix, sys.executable, "-m", "fovea", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- fovea show ----------------------------------------------------------------------------------


def test_show_says_why_fast_is_exact(tmp_path: Path, command: Command, capsys: Output) -> None:
    geometry = Geometry(16, 16, parse_steps("crop 20, resize stretch 16 bilinear"), PixelPath.FAST)
    root = add_to_repository(build_model(geometry=geometry), tmp_path / "zoo", "small")
    assert command("show", "small", "--models", root) == 0
    reason = "another step than one crop to an aspect ratio precedes the resize"
    assert f"pixels         fast, which is exact here: {reason}\n" in capsys.readouterr().out


def test_show_describes_the_contract(command: Command, capsys: Output) -> None:
    path = ROOT / "zoo" / "cifar10" / "4" / "model.onnx"
    assert command("show", "cifar10", "--models", ROOT / "zoo") == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: fact.strip() for name, fact in facts.items()}
    assert facts["model"] == "cifar10 version 4 (contract format 3)"
    assert facts["labels"].startswith("10: airplane, automobile, bird, ")
    assert facts["task"] == "multiclass: exactly one label is true"
    assert facts["input"] == "32 x 32 pixels (height x width), RGB"
    assert facts["geometry"] == "resize cover 32 x 32 bilinear, crop 32 x 32"
    assert facts["normalisation"].startswith("inside the graph (Reshape, Cast, BatchNormalization, ")
    assert facts["calibration"].startswith("temperature 0.7196; coverage sets for 20 levels, 80% to 99%")
    assert facts["accuracy"].startswith("91.14% of 9,900 images, calibration error ")
    assert facts["precision"].startswith("int8 with weights of 7 bits, converted from version 3; ")
    assert facts["known"] == "score of at least 3.13, as of 95% of 9,900 held-out images"
    assert facts["golden set"].startswith("8 images; tolerance of the logits: cpu/float32 ")
    assert facts["training"].startswith("cifar10-jpeg.tar.gz, 45,000 images, commit ")
    assert facts["made by"].startswith("fovea train --data ")
    assert facts["converted by"].startswith("fovea quantize ")
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert facts["sha256"] == digest


@pytest.mark.parametrize("task", Task)
def test_show_describes_models_without_measurements(
    tmp_path: Path, command: Command, capsys: Output, task: Task
) -> None:
    labels = ("ant", "bee\x1b[31m") if task is Task.BINARY else tuple(f"label {n}\x1b[31m" for n in range(12))
    model = build_model(task, labels)
    contract = replace(
        read_contract(model), accuracy=None, reference=None, coverage=(), training=replace(TRAINING)
    )
    path = tmp_path / "model.onnx"
    onnx.save(with_contract(model, contract), path)
    assert command("show", path) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\\x1b[31m" in output
    assert ("and 2 more\n" in output) == (task is not Task.BINARY)
    assert ("threshold" in output) == (task is not Task.MULTICLASS)
    for text in (
        "calibration    none (temperature 1); no coverage sets",
        "accuracy       not measured",
        "precision      float32",
        "drift          no reference: drift cannot be measured",
        "training       imported: other.onnx, sha256:0123",
    ):
        assert f"{text}\n" in output
    assert command("show", path, "--json") == 0
    assert Contract.from_json(capsys.readouterr().out) == contract


TRAINING = replace(
    read_contract(build_model()).training, data="imported: other.onnx", images=0, commit="sha256:0123"
)


def test_show_finds_names_folders_and_files(
    zoo: Path, command: Command, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_version(reference: object) -> str:
        assert command("show", reference, "--json") == 0
        return Contract.from_json(capsys.readouterr().out).version

    small = zoo / "small"
    refuse(small / "10" / "model.onnx", "it flips too many labels")
    assert find_version("small") == "2"
    assert find_version("small/10") == "10"
    for path, version in (
        (small, "2"),
        (small / "1", "1"),
        (small / "1" / "model.onnx", "1"),
        (f"{small}/", "2"),
    ):
        assert find_version(path) == version
    monkeypatch.chdir(small)
    assert find_version(".") == "2"
    assert find_version("10") == "10"
    for version in ("1", "2"):
        refuse(small / version / "model.onnx", "it flips too many labels")
    assert find_version("small") == "10"


def test_show_errors_are_one_sentence(zoo: Path, command: Command, capsys: Output) -> None:
    (zoo / "empty").mkdir()
    broken = zoo / "small" / "11" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"no model at all")
    for reference, message in {
        "other": f"there is no model 'other' in {zoo}; there are empty, small",
        "small/3": "small has no version 3; there are 1, 2, 10, 11",
        "small/11": f"{broken}: the file is not an ONNX model",
        "empty": f"{zoo}/empty has no <version>/model.onnx",
        "../small/1": "there is no file, folder or NAME/VERSION '../small/1'",
        "nowhere.onnx": "there is no file, folder or NAME/VERSION 'nowhere.onnx'",
        zoo: f"{zoo} has no model.onnx; `fovea models {zoo}` lists a repository",
    }.items():
        assert command("show", reference) == 2
        assert read_error_line(capsys) == f"fovea: {message}\n"


# --- fovea remove --------------------------------------------------------------------------------


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_remove_deletes_one_version(zoo: Path, command: Command, capsys: Output) -> None:
    refuse(zoo / "small" / "2" / "model.onnx", "it flips too many labels")
    abandoned = zoo / "small" / ".remove-0123"
    shutil.copytree(zoo / "small" / "2", abandoned)
    assert command("remove", "small/2", "--yes") == 0
    assert capsys.readouterr().out == (
        f"removed {zoo}/small/2; a running service unloads this version by itself\n"
    )
    assert list_files(zoo) == ["small", "small/1", "small/1/model.onnx", "small/10", "small/10/model.onnx"]


def test_last_version_needs_all(zoo: Path, command: Command, capsys: Output) -> None:
    for version in ("1", "2"):
        assert command("remove", f"small/{version}", "--yes") == 0
    (zoo / "small" / "11").mkdir()  # without a model file, it is no version that could be served
    (zoo / "default").write_text("small\n")
    capsys.readouterr()
    assert command("remove", "small/10", "--yes") == 2
    message = "fovea: version 10 is the only version of small; add --all to remove the model\n"
    assert read_error_line(capsys) == message
    assert command("remove", "small/11", "--yes") == 0
    capsys.readouterr()
    assert command("remove", "small/10", "--yes", "--all") == 0
    assert f"note: {zoo}/default still names small; write another name\n" in capsys.readouterr().out
    assert list_files(zoo) == ["default"]


def test_remove_refuses_what_is_no_version_of_the_repository(
    zoo: Path, command: Command, capsys: Output
) -> None:
    elsewhere = zoo.with_name("elsewhere")
    shutil.copytree(zoo / "small", elsewhere / "small")
    (zoo / "linked").symlink_to(elsewhere / "small")
    before = list_files(zoo.parent)
    for reference, message in {
        "small": "'small' is not NAME/VERSION; give a version of a model, such as pets/1",
        "small/latest": "'small/latest' is not NAME/VERSION; give a version of a model, such as pets/1",
        "other/1": f"there is no model 'other' in {zoo}; there are linked, small",
        "small/3": "small has no version 3; there are 1, 2, 10",
        "../elsewhere/small/1": f"there is no model '../elsewhere/small' in {zoo}; there are linked, small",
        "./1": f"there is no model '.' in {zoo}; there are linked, small",
        "../1": f"there is no model '..' in {zoo}; there are linked, small",
        "/1": f"there is no model '' in {zoo}; there are linked, small",
        f"{zoo}/small/1": f"there is no model '{zoo}/small' in {zoo}; there are linked, small",
        "linked/1": f"{zoo}/linked is a link to {elsewhere}/small; remove the version there, or the link",
    }.items():
        assert command("remove", reference, "--yes", "--all") == 2
        assert read_error_line(capsys) == f"fovea: {message}\n"
    path = zoo / "small" / "1" / "model.onnx"
    assert command("remove", "small/1", "--models", path, "--yes") == 2
    assert "is one model file and not a repository" in read_error_line(capsys)
    (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]')
    assert command("remove", "small/1", "--yes") == 2
    assert "config.toml asks for version 1; change its versions first" in read_error_line(capsys)
    (zoo / "small" / "config.toml").unlink()
    assert list_files(zoo.parent) == before


def test_targets_of_links_are_kept(zoo: Path, command: Command) -> None:
    elsewhere = zoo.with_name("elsewhere")
    shutil.copytree(zoo / "small" / "1", elsewhere)
    (zoo / "small" / "3").symlink_to(elsewhere)
    (zoo / "small" / "2" / "more").symlink_to(elsewhere)
    for version in ("2", "3"):
        assert command("remove", f"small/{version}", "--yes") == 0
    assert list_files(elsewhere) == ["model.onnx"]
    assert sorted(path.name for path in (zoo / "small").iterdir()) == ["1", "10"]


@pytest.mark.long
def test_remove_asks_on_a_terminal(zoo: Path) -> None:
    process = run_fovea("remove", "small/1")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"fovea: {zoo}/small/1 is not removed without a question; add --yes\n"
    output, code = read_terminal("remove", "small/1", keys=b"n\n")
    assert code == 1
    assert f"Remove {zoo}/small/1 for good? [y/N]: " in output
    assert "nothing was removed" in output
    assert (zoo / "small" / "1" / "model.onnx").is_file()
    output, code = read_terminal("remove", "small/1", keys=b"y\n")
    assert code == 0, output
    assert not (zoo / "small" / "1").exists()


def test_failed_deletion_leaves_no_half_version(zoo: Path) -> None:
    small = zoo / "small"
    (small / "2").chmod(0o500)
    process = run_without_privileges("remove", "small/2", "--yes")
    (hidden_folder,) = small.glob(".remove-*")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(
        f"fovea: {small}/2 is removed from the repository, but not all its files: "
    )
    assert process.stderr.endswith(f"; delete {hidden_folder}\n")
    assert not (small / "2").exists()
    small.chmod(0o500)
    process = run_without_privileges("remove", "small/1", "--yes")
    assert process.stderr == f"fovea: cannot remove {small}/1: Permission denied\n"
    assert (small / "1" / "model.onnx").is_file()


@pytest.mark.long
def test_running_service_unloads_a_removed_version(zoo: Path, command: Command) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1") as server:
        assert get_served_version(server) == "10"
        assert command("remove", "small/10", "--yes") == 0
        wait_until(lambda: get_served_version(server) == "2")
