"""The certificate of the gRPC port when its files change."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
import pytest

from fovea.service.grpc.credentials import CertificateSource
from fovea.service.http.certificates import CertificateFiles
from tests.certificates import Authority


def test_problem_is_logged_once_and_files_are_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC asks at each handshake, and any client can start one."""
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    source = CertificateSource(CertificateFiles(pair.certificate, pair.key))
    source.load()
    assert source.fetch() is None
    renewed = authority.issue("renewed")
    pair.key.unlink()
    with caplog.at_level(logging.ERROR):
        assert source.fetch() is source.fetch() is None
        assert len(caplog.records) == 1 and "cannot read" in caplog.text
        pair.key.mkdir()  # has a stamp, and cannot be read
        assert source.fetch() is source.fetch() is None
        assert len(caplog.records) == 2
        pair.key.rmdir()
        pair.replace_with(renewed)
        assert isinstance(source.fetch(), grpc.ServerCertificateConfiguration)
        assert source.fetch() is None


def test_file_that_could_not_be_read_is_read_without_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds no free file descriptor, which is no fault of the file."""
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    source = CertificateSource(CertificateFiles(pair.certificate, pair.key))
    pair.replace_with(authority.issue("renewed"))
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(24, "Too many open files")

        patch.setattr(Path, "open", fail)
        assert source.fetch() is None
    assert source.fetch() is not None
