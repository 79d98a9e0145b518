"""`fovea keys`: the file that a service reads, and the key that is shown once."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fovea.service.access.access_control import AccessControl
from fovea.service.access.caller import Scope
from fovea.service.access.key_editor import add_key, create_key
from fovea.service.access.keys_file import KeysFileError, read_keys_file
from tests.commands import Command
from tests.servers import ROOT


def find_name(file: Path, key: str) -> str:
    """Return the name under which a service would know a key."""
    access = AccessControl(read_keys_file(file))
    return access.identify([(b"x-api-key", key.encode())]).name


def test_added_key_opens_its_scopes_and_is_shown_once(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    options = ["--scope", "classify", "--scope", "metrics", "--expires", "2099-12-31", "--file", str(file)]
    assert command("keys", "add", "app", *options) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("fovea_")
    assert key not in file.read_text()
    assert find_name(file, key) == "app"
    (entry,) = read_keys_file(file)
    assert entry.scopes == {Scope.CLASSIFY, Scope.METRICS}
    assert command("keys", "list", "--json", "--file", str(file)) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "app", "scopes": ["classify", "metrics"], "last_day": "2099-12-31", "expired": False}
    ]


def test_removed_key_leaves_comments_and_other_keys(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    monkeypatch.setenv("FOVEA_KEYS", str(file))
    file.write_text("# app: of the phone\n")
    file.chmod(0o640)
    for name in ("app", "app-2"):
        assert command("keys", "add", name) == 0
    new_key = capsys.readouterr().out.split()[1]
    assert command("keys", "remove", "app") == 0
    assert find_name(file, new_key) == "app-2"
    assert file.read_text().startswith("# app: of the phone\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert command("keys", "remove", "app-2") == 0
    assert read_keys_file(file) == ()  # valid, so that a service refuses everybody


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "app"], "there is a key 'app' already"),
        (["add", "other"], "the name 'other'"),
        (["add", "a b"], "a name has 1 to 64 letters"),
        (["add", "b", "--scope", "admin"], "a scope is not known; give classify, explain, manage, metrics"),
        (["add"], "needs the name of a key"),
        (["add", "b", "--expires", "tomorrow"], "the last day is not a date like 2027-06-30"),
        (["add", "b", "--expires", "2020-02-29"], "--expires is 2020-02-29, which has passed"),
        (["remove", "b"], "there is no key 'b'"),
        (["remove", "b", "--scope", "classify"], "--scope is for `fovea keys add`"),
        (["list", "app"], "takes no name"),
        (["add", "b", "--file", "missing/keys"], "its folder cannot be opened"),
        (["list", "--file", "missing"], "No such file"),
        (["list", "--file", "."], "Is a directory"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "keys"
    monkeypatch.setenv("FOVEA_KEYS", str(file))
    add_key(file, "app", frozenset({Scope.CLASSIFY}))
    content = file.read_bytes()
    assert command("keys", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert file.read_bytes() == content


def test_file_with_a_bad_line_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("app:classify:secret\n")
    with pytest.raises(KeysFileError, match="line 1: the third field"):
        add_key(file, "b", frozenset({Scope.CLASSIFY}))
    assert file.read_text() == "app:classify:secret\n"


def test_new_file_has_the_permissions_before_it_has_the_content(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "app", frozenset({Scope.CLASSIFY}))
    file.chmod(0o600)
    code = (
        "import os, sys; from pathlib import Path; from fovea.service.access.key_editor import remove_key\n"
        "sys.addaudithook(lambda event, values: event == 'os.chmod' and print(os.stat(values[0]).st_size))\n"
        "remove_key(Path(sys.argv[1]), 'app')"
    )
    command = [sys.executable, "-c", code, str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "0\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys_file(file) == ()


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("keys")
    add_key(tmp_path / "link", "app", frozenset({Scope.CLASSIFY}))
    assert (tmp_path / "link").is_symlink()
    assert read_keys_file(tmp_path / "keys")[0].name == "app"


def test_several_processes_add_keys_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fovea.service.access.key_editor import add_key;"
        "from fovea.service.access.caller import Scope;"
        "[add_key(Path(sys.argv[1]), f'{sys.argv[2]}-{i}', frozenset(Scope)) for i in range(20)]"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "keys"), str(number)], cwd=ROOT)
        for number in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(read_keys_file(tmp_path / "keys")) == 60
    assert os.listdir(tmp_path) == ["keys"]  # noqa: PTH208


def test_keys_are_random_and_valid() -> None:
    keys = {create_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {38}
