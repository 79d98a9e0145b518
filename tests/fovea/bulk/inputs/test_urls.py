"""Images at https URLs, behind the guard of `service/remote/guarded_https.py`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from fovea.bulk.inputs import list_entries
from fovea.bulk.inputs.urls import HttpsAccess, UrlEntry
from fovea.errors import BodyTooLarge, FileError, StartError
from tests.fovea.bulk.inputs.listing import read_sources
from tests.pictures import make_jpeg
from tests.service.remote.test_guarded_https import Web

PHOTO = "https://photos.example.com/a.jpg?size=2"


def resolve_privately(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    web = Web(tmp_path_factory.mktemp("web"))
    yield web
    web.close()


def test_image_of_an_allowed_host_is_read(web: Web) -> None:
    entry = UrlEntry(PHOTO, HttpsAccess(("photos.example.com",), web.resolve, web.connect, web.trust))
    assert entry.read(100_000) == make_jpeg()
    assert (entry.name, entry.is_named) == (PHOTO, True)
    with pytest.raises(BodyTooLarge, match="more than 10 bytes"):
        entry.read(10)
    missing = UrlEntry("https://photos.example.com/status/404", entry.access)
    with pytest.raises(FileError, match="the host answered 404"):
        missing.read(100_000)


def test_private_address_is_a_row() -> None:
    rows = read_sources(PHOTO, allowed_hosts=["photos.example.com"], resolver=resolve_privately)
    assert rows == [
        (
            PHOTO,
            "unreadable_file: https://photos.example.com/a.jpg: the host has a private or reserved address",
        )
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "https://other.example.com/a.jpg",
            "not in the list of allowed hosts .photos.example.com.; name hosts with",
        ),
        ("http://photos.example.com/a.jpg", "only https:// is allowed"),
        ("https://photos.example.com/a b.jpg", "not a URL"),
        (
            "https://photos.example.com/a.zip?x=1",
            "archives and tables are not read from a URL; download it first",
        ),
    ],
)
def test_url_that_is_not_allowed_is_refused_before_the_first_image(url: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        list_entries([url], allowed_hosts=["photos.example.com"])


def test_no_host_is_allowed_by_default_and_wrong_hosts_are_refused() -> None:
    with pytest.raises(StartError, match=r"allowed hosts \(it is empty\); name hosts with --allow-host"):
        list_entries([PHOTO])
    with pytest.raises(StartError, match="is not an allowed host"):
        list_entries(["a.jpg"], allowed_hosts=["https://photos.example.com"])


def test_urls_of_tables_and_lists_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "photos.csv"
    path.write_text(f"url\n{PHOTO}\nhttps://other.example.com/a.jpg\nHTTP://photos.example.com/a.jpg\n")
    rows = read_sources(path, allowed_hosts=["photos.example.com"], resolver=resolve_privately)
    assert [name for name, _ in rows] == path.read_text().splitlines()[1:]
    assert [
        "private" in str(rows[0][1]),
        "list of allowed" in str(rows[1][1]),
        "only https" in str(rows[2][1]),
    ] == [True] * 3
    names = io.BytesIO(path.read_bytes().partition(b"\n")[2])
    assert rows == read_sources(
        "-", stdin=names, allowed_hosts=["photos.example.com"], resolver=resolve_privately
    )


def test_entry_is_picklable_with_the_hosts() -> None:
    (entry,) = list_entries([PHOTO], allowed_hosts=["*.example.com"])
    assert pickle.loads(pickle.dumps(entry)) == UrlEntry(PHOTO, HttpsAccess(("*.example.com",)))  # noqa: S301
