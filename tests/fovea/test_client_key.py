"""The clients' API keys, against a service that needs them."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import fovea
from fovea.errors import MissingScope, Unauthorized
from fovea.service.access.caller import Scope
from fovea.service.access.key_editor import add_key
from tests.commands import Command
from tests.pictures import make_jpeg
from tests.servers import Server

PHOTO = make_jpeg()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def key(keys_file: Path) -> str:
    return add_key(keys_file, "app", frozenset({Scope.CLASSIFY}))


@pytest.fixture(scope="module")
def other_key(keys_file: Path) -> str:
    return add_key(keys_file, "prober", frozenset({Scope.METRICS}))


@pytest.fixture(scope="module")
def key_server(small_zoo: Path, keys_file: Path, key: str, other_key: str) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_KEYS=str(keys_file)) as server:
        yield server


def test_both_clients_send_the_key(key_server: Server, key: str) -> None:
    with fovea.Client(key_server.url, key=key) as client:
        label = client.classify(PHOTO).label
        assert key not in repr(client)
        with pickle.loads(pickle.dumps(client)) as copy:  # noqa: S301 - our own bytes
            assert copy.classify(PHOTO).label == label

    async def ask() -> str:
        async with fovea.AsyncClient(key_server.url, key=key) as client:
            return (await client.classify(PHOTO)).label

    assert asyncio.run(ask()) == label


def test_key_comes_from_the_environment(
    key_server: Server, key: str, other_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEA_KEY", key)
    with fovea.Client(key_server.url) as client:
        assert client.classify(PHOTO).label
    with (
        fovea.Client(key_server.url, key=other_key) as client,
        pytest.raises(MissingScope, match="'prober' lacks the scope 'classify'"),
    ):
        client.classify(PHOTO)


@pytest.mark.parametrize(
    ("wrong_key", "message"), [(None, "the request has no API key"), ("wrong", "the API key is not known")]
)
def test_refusal_is_an_error_that_says_where_a_key_goes(
    key_server: Server, monkeypatch: pytest.MonkeyPatch, wrong_key: str | None, message: str
) -> None:
    monkeypatch.delenv("FOVEA_KEY", raising=False)
    with fovea.Client(key_server.url, key=wrong_key) as client:
        with pytest.raises(Unauthorized, match=message) as caught:
            client.classify(PHOTO)
        assert client.ready()  # which needs no key
    assert "FOVEA_KEY" in str(caught.value)


@pytest.mark.parametrize("bad_key", ["", "two words", "clé", "k" * 513, "a\r\nHost: b"])
def test_impossible_key_is_refused_without_quoting_it(bad_key: str) -> None:
    with pytest.raises(ValueError, match="key is not an API key") as caught:
        fovea.Client("http://127.0.0.1:1", key=bad_key)
    assert not bad_key or bad_key not in str(caught.value)


def test_bench_sends_the_key(
    key_server: Server,
    key: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FOVEA_KEY", "")
    assert command("bench", key_server.url, "--seconds", "0.2") == 2
    assert "401" in capsys.readouterr().err
    assert command("bench", key_server.url, "--seconds", "0.2", "--json", "--key", key) == 0
