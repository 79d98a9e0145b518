"""Loading, checking and renewing of the service's certificate."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from fovea.service.errors import SettingsError
from fovea.service.http.certificates import (
    CertificateError,
    CertificateFiles,
    Certificates,
    load_context,
)
from fovea.service.settings import load_settings
from tests.certificates import Authority, Pair
from tests.servers import run_service

EXPIRED = datetime(2021, 1, 1, tzinfo=UTC)


def files_of(pair: Pair, authorities: Path | None = None) -> CertificateFiles:
    return CertificateFiles(pair.certificate, pair.key, authorities)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_good_pair_has_the_end_of_its_validity(authority: Authority) -> None:
    end = datetime(2099, 5, 4, 3, 2, 1, tzinfo=UTC)
    context, expires_at = load_context(files_of(authority.issue("good", expires_at=end)))
    assert expires_at == end.timestamp()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_bad_files_are_refused_with_a_sentence(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    half = Pair(tmp_path / "half.crt", good.key)
    half.certificate.write_bytes(good.certificate.read_bytes()[:400])
    binary = Pair(tmp_path / "binary.crt", good.key)
    binary.certificate.write_bytes(bytes(100))
    huge = Pair(tmp_path / "huge.crt", good.key)
    huge.certificate.write_bytes(bytes(2 << 20))
    locked = Pair(good.certificate, tmp_path / "locked.key")
    key = load_pem_private_key(good.key.read_bytes(), None)
    locked.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for files, message in (
        (files_of(Pair(good.certificate, other.key)), "does not belong to the certificate in"),
        (files_of(authority.issue("old", expires_at=EXPIRED)), "is not valid: certificate has expired"),
        (files_of(half), "are no certificate and its key"),
        (files_of(binary), "is not a PEM file"),
        (files_of(locked), "has a pass phrase; remove it with `openssl pkey"),
        (files_of(Pair(tmp_path / "absent.crt", good.key)), "No such file or directory"),
        (files_of(Pair(tmp_path, good.key)), "Is a directory"),
        (files_of(good, tmp_path / "absent.pem"), "No such file or directory"),
        (files_of(good, empty), "has no certificates of authorities"),
        (files_of(good, good.certificate), "has no certificate of an authority"),
    ):
        with pytest.raises(CertificateError) as raised:
            load_context(files)
        assert message in str(raised.value)
        assert "secret" not in str(raised.value)
    with pytest.raises(CertificateError, match="has 2097152 bytes; at most 1048576"):
        files_of(huge).read_stamp()


def test_wrong_pair_stops_the_start_with_a_sentence(authority: Authority) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    for workers in ("1", "2"):
        result = run_service(
            FOVEA_WORKERS=workers, FOVEA_TLS_CERT=str(good.certificate), FOVEA_TLS_KEY=str(other.key)
        )
        assert result.returncode == 2
        assert result.stderr == (
            f"fovea: the key in {other.key} does not belong to the certificate in {good.certificate}\n"
        )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tls_cert",), "FOVEA_TLS_KEY is missing"),
        (("tls_key",), "FOVEA_TLS_CERT is missing"),
        (("tls_client_ca",), "FOVEA_TLS_CLIENT_CA needs FOVEA_TLS_CERT"),
    ],
)
def test_incomplete_settings_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(**dict.fromkeys(names, "/x.pem"))


# --- renewal -------------------------------------------------------------------------------------


class Watched:
    """Certificates that are watched, and what was reported of them."""

    def __init__(self, files: CertificateFiles) -> None:
        self.reports: list[bool] = []
        self.has_reported = asyncio.Event()
        self.certificates = Certificates(files, on_reload=self._report, poll_seconds=0.01)

    def _report(self, is_loaded: bool) -> None:
        self.reports.append(is_loaded)
        self.has_reported.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.has_reported.wait(), 30)
        self.has_reported.clear()


@asynccontextmanager
async def watch(files: CertificateFiles) -> AsyncIterator[Watched]:
    watched = Watched(files)
    task = asyncio.create_task(watched.certificates.watch())
    try:
        yield watched
    finally:
        task.cancel()


def test_changed_files_are_loaded(authority: Authority) -> None:
    async def scenario() -> None:
        pair = authority.issue("used")
        end = datetime(2099, 1, 1, tzinfo=UTC)
        async with watch(files_of(pair)) as watched:
            old_context = watched.certificates.context
            pair.replace_with(authority.issue("new", expires_at=end))
            await watched.wait()
            assert watched.certificates.context is not old_context
            assert watched.certificates.expires_at == end.timestamp()
            assert watched.reports == [True]

    asyncio.run(scenario())


def test_wrong_new_pair_is_reported_once_and_the_old_one_stays(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        pair, new = authority.issue("used"), authority.issue("new")
        async with watch(files_of(pair)) as watched:
            old_context = watched.certificates.context
            pair.certificate.write_bytes(new.certificate.read_bytes())
            await watched.wait()
            os.utime(pair.certificate)  # the same again
            await asyncio.sleep(0.1)
            assert watched.certificates.context is old_context
            pair.certificate.unlink()
            await watched.wait()
            assert watched.certificates.context is old_context
            await asyncio.sleep(0.1)
            assert watched.reports == [False, False]
            pair.replace_with(new)
            await watched.wait()
            assert watched.certificates.context is not old_context
        errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
        assert len(errors) == 2
        assert "the old one stays" in errors[0]
        assert "does not belong" in errors[0]
        assert "No such file" in errors[1]

    asyncio.run(scenario())


def test_file_that_is_too_large_does_not_end_the_watch(authority: Authority) -> None:
    async def scenario() -> None:
        pair, new = authority.issue("used"), authority.issue("new")
        async with watch(files_of(pair)) as watched:
            pair.certificate.write_bytes(bytes((1 << 20) + 1))
            await watched.wait()
            pair.replace_with(new)
            await watched.wait()
            assert watched.reports == [False, True]

    asyncio.run(scenario())


def test_unexpected_error_does_not_end_the_watch(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        pair, has_loaded = authority.issue("used"), asyncio.Event()

        def report(_: bool) -> None:
            has_loaded.set()
            raise RuntimeError("can't start new thread")

        certificates = Certificates(files_of(pair), on_reload=report, poll_seconds=0.01)
        task = asyncio.create_task(certificates.watch())
        for name in ("new", "newer"):
            pair.replace_with(authority.issue(name))
            await asyncio.wait_for(has_loaded.wait(), 30)
            has_loaded.clear()
        task.cancel()

    asyncio.run(scenario())
    assert "the certificate could not be watched" in caplog.text


def test_kubernetes_replaces_a_link_to_a_folder(authority: Authority, tmp_path: Path) -> None:
    async def scenario() -> None:
        link = tmp_path / "..data"
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            pair = authority.issue(name)
            pair.certificate.rename(tmp_path / name / "tls.crt")
            pair.key.rename(tmp_path / name / "tls.key")
        link.symlink_to("first")
        async with watch(CertificateFiles(link / "tls.crt", link / "tls.key")) as watched:
            other = tmp_path / "..tmp"
            other.symlink_to("second")
            other.rename(link)
            await watched.wait()
            assert watched.reports == [True]

    asyncio.run(scenario())


def test_expired_certificate_in_use_is_logged_once_a_day(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with watch(files_of(authority.issue("used"))) as watched:
            watched.certificates.expires_at = time.time() - 1
            await asyncio.sleep(0.1)
        assert [one.getMessage() for one in caplog.records if "expired at" in one.getMessage()] != []
        assert len(caplog.records) == 1

    asyncio.run(scenario())
