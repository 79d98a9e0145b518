"""The keys file: strict parsing, and messages that never quote it."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import date
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.service.access.caller import Scope
from fovea.service.access.keys_file import (
    MAX_FILE_BYTES,
    MAX_KEYS,
    ApiKey,
    KeysFileError,
    hash_key,
    parse_keys,
    read_keys_file,
)

DIGEST = hash_key(b"secret")
LINE = f"app:classify:{DIGEST.hex()}"


def test_lines_are_read_with_comments_and_empty_lines() -> None:
    other = hash_key(b"other").hex().upper()
    content = f"# my clé\n\n{LINE}\r\n  ops:manage,metrics:{other}:2027-06-30 \n".encode()
    assert parse_keys(content) == (
        ApiKey("app", frozenset({Scope.CLASSIFY}), DIGEST),
        ApiKey("ops", frozenset({Scope.MANAGE, Scope.METRICS}), hash_key(b"other"), date(2027, 6, 30)),
    )
    assert parse_keys(b"# nobody\n") == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (f"{LINE}\n{LINE}".encode(), "line 2 does not end with a line feed"),
        (f"{LINE}\n{LINE}\n".encode(), "line 2: its name is already on line 1"),
        (f"{LINE}\nb{LINE}\n".encode(), "line 2: its key is already on line 1"),
        (b"secret\n", "line 1: it has 1 fields"),
        (f"#\n{LINE}:2027-01-01:x\n".encode(), "line 2: it has 5 fields"),
        (f"{LINE}:\n".encode(), "line 1: the last day is not a date"),
        (f"{LINE}:20270101\n".encode(), "line 1: the last day is not a date"),
        (f"{LINE}:2027-02-30\n".encode(), "line 1: the last day is not a date"),
        (f"{LINE[:-1]}\n".encode(), "line 1: the third field is not a SHA-256"),
        (b"app:classify:secret\n", "line 1: the third field is not a SHA-256"),
        (LINE.replace("classify", "").encode() + b"\n", "line 1: a scope is not known"),
        (LINE.replace("classify", "classify,").encode() + b"\n", "line 1: a scope is not known"),
        (LINE.replace("classify", "admin").encode() + b"\n", "line 1: a scope is not known"),
        (f"-{LINE}\n".encode(), "line 1: a name has 1 to 64 letters"),
        (LINE.replace("app", "").encode() + b"\n", "line 1: a name has 1 to 64 letters"),
        (LINE.replace("app", "other").encode() + b"\n", "line 1: the name 'other'"),
        (f"é{LINE}\n".encode(), "line 1: it has characters that are not ASCII"),
        (b"\0" * 100 + b"\n", "line 1: it has 1 fields"),
        (
            b"".join(b"%d%b\n" % (i, LINE[:-4].encode() + b"%04x" % i) for i in range(MAX_KEYS + 1)),
            "1000 keys",
        ),
    ],
)
def test_bad_file_is_refused_with_its_line(content: bytes, message: str) -> None:
    with pytest.raises(KeysFileError, match=message) as caught:
        parse_keys(content)
    assert "secret" not in str(caught.value)


def test_only_a_regular_file_of_limited_size_is_read(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="Is a directory"):
        read_keys_file(tmp_path)
    with pytest.raises(KeysFileError, match="No such file"):
        read_keys_file(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KeysFileError, match="not a regular file"):
        read_keys_file(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * MAX_FILE_BYTES + b"\n")
    with pytest.raises(KeysFileError, match="more than 1048576 bytes"):
        read_keys_file(tmp_path / "large")
    file = tmp_path / "keys"
    file.write_text(f"{LINE}\n")
    (tmp_path / "link").symlink_to(file)
    assert read_keys_file(tmp_path / "link")[0].name == "app"


KEYS = st.builds(
    ApiKey,
    st.text("aZ9._-", min_size=1, max_size=10).map("k{}".format),
    st.frozensets(st.sampled_from(Scope), min_size=1),
    st.binary(min_size=32, max_size=32),
    st.none() | st.dates(),
)


@hypothesis.settings(max_examples=30)
@given(st.lists(KEYS, min_size=1, max_size=5, unique_by=(lambda key: key.name, lambda key: key.digest)))
def test_written_keys_are_read_back(keys: list[ApiKey]) -> None:
    content = "".join(f"{key.to_line()}\n" for key in keys).encode()
    assert parse_keys(content) == tuple(keys)


@given(st.binary(max_size=200) | st.text(":#\nabclassify,0123456789-", max_size=200).map(str.encode))
def test_any_bytes_are_keys_or_an_error(content: bytes) -> None:
    with suppress(KeysFileError):
        parse_keys(content)


def test_cut_file_never_lets_a_key_live_longer() -> None:
    content = f"{LINE}:2027-06-30\n".encode()
    for end in range(len(content)):
        with pytest.raises(KeysFileError):
            parse_keys(content[:end])


def test_key_works_until_the_end_of_its_last_day() -> None:
    key = ApiKey("app", frozenset({Scope.CLASSIFY}), DIGEST, date(1970, 1, 2))
    assert key.expires_at == 2 * 86_400
    assert ApiKey("app", frozenset(), DIGEST, date(9999, 12, 31)).expires_at > 0
