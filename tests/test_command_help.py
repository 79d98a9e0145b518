"""Help texts of the command, and its messages about mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fovea.commands.examples import EXAMPLES as COMMANDS
from fovea.service.errors import SettingsError
from fovea.service.settings import Settings, load_settings
from tests.commands import make_command, read_error_line
from tests.test_command import run_fovea

MISTAKES = {
    "classify": "`fovea classify` needs SOURCES, such as: fovea classify cat.jpg photos --top-k 3",
    "explain x": "`fovea explain` needs --out, such as: fovea explain cat.jpg --out heat.png",
    "clasify x": "there is no command 'clasify'; did you mean classify?",
    "frobnicate": "there is no command 'frobnicate'; see `fovea --help`",
    "classify --topk 3 x": "there is no option '--topk'; did you mean --top-k?",
    "serve a b": "got unexpected extra argument(s) (b); see `fovea serve --help`",
    "classify x --top-k many": "'--top-k' is 'many': it takes an integer of at least 0",
    "classify x --top-k -1": "'--top-k' is '-1': it takes an integer of at least 0",
    "bench x --seconds 0": "'--seconds' is '0': it takes a number from 0.1 to 3600",
    "bench x --seconds nan": "'--seconds' is 'nan': it takes a number from 0.1 to 3600",
    "explain x -o y --method z": "'--method' is 'z': it takes auto, cam or occlusion",
    "explain nowhere.jpg -o y.png": "nowhere.jpg: No such file or directory",
    "explain . -o y.png": ".: Is a directory",
    **{
        f"bench {url}": f"{url} is not an address that can be loaded; give one like http://127.0.0.1:8000"
        for url in ("http://[::1", "http://localhost:99999", "http://a..b:80", "ftp://localhost", "http://")
    },
    "publish nowhere.onnx": "cannot read the model nowhere.onnx: No such file or directory",
    "publish .": "cannot read the model .: Is a directory",
    "bench localhost:1 nowhere.jpg": "nowhere.jpg: No such file or directory",
    "export nowhere --out zoo/x/1": "there is no nowhere/weights.safetensors; "
    "`fovea train --out nowhere` makes one",
    "serve nowhere": "FOVEA_MODELS is 'nowhere': No such file or directory; "
    "give a model repository (--models) or one model file",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_usage_error_is_one_sentence(
    small_zoo: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: str
) -> None:
    monkeypatch.setenv("FOVEA_MODELS", str(small_zoo))
    assert make_command(monkeypatch)(*arguments.split()) == 2
    assert read_error_line(capfd) == f"fovea: {MISTAKES[arguments]}\n"


@pytest.mark.parametrize("value", ["x!", "-1", "1e300"])
def test_setting_errors_contain_no_library_wording(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    error_count = 0
    for name in Settings.model_fields:
        with monkeypatch.context() as context:
            context.setenv(f"FOVEA_{name.upper()}", value)
            try:
                load_settings()
            except SettingsError as error:
                assert str(error).startswith((f"FOVEA_{name.upper()} is {value!r}: ", "FOVEA_"))
                assert not re.search(r"[Ii]nput|parse|valid|instance|union", str(error)), str(error)
                error_count += 1
    assert error_count > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_and_has_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_command(monkeypatch)(name, "--help") == 0
    help_text = capsys.readouterr().out
    example = re.search(rf"^  Example: fovea {name} \S.*$", help_text, re.MULTILINE)
    assert example is not None
    assert "│" not in help_text
    assert not re.search(r"<(list|str|int|path|float|bool)", help_text)
    assert "TEXT" in help_text or "PATH" in help_text or name == "doctor"


def test_examples_use_existing_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, example in COMMANDS.items():
        make_command(monkeypatch)(name, "--help")
        help_text = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", example):
            assert option in help_text, example


@pytest.mark.long
def test_help_lists_every_command(small_zoo: Path) -> None:
    help_text = run_fovea("--help", zoo=small_zoo).stdout
    for command in ("serve", "classify", "train", "export", "import"):
        assert command in help_text
        assert run_fovea(command, "--help", zoo=small_zoo).returncode == 0
