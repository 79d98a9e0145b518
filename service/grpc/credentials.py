"""TLS of the gRPC port: the files of FOVEA_TLS_CERT, read again when they have changed."""

from __future__ import annotations

import logging

import grpc

from fovea.service.http.certificates import (
    CertificateError,
    CertificateFiles,
    UnreadableFile,
    load_context,
)

log = logging.getLogger(__name__)


def create_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Return credentials that follow the files. Raises `CertificateError`.

    If there are authorities, gRPC demands a certificate from every client in the handshake, also for health.
    """
    source = CertificateSource(files)
    return grpc.dynamic_ssl_server_credentials(
        source.load(),
        source.fetch,
        require_client_authentication=files.client_authorities is not None,
    )


class CertificateSource:
    """The content of the files. gRPC calls `fetch` at each handshake, in a thread of its own."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._stamp = files.read_stamp()
        self._last_message = ""

    def load(self) -> grpc.ServerCertificateConfiguration:
        """Check the files and return their content. Raises `CertificateError`."""
        files = self._files
        load_context(files)
        try:
            authorities = files.client_authorities.read_bytes() if files.client_authorities else None
            pair = (files.key.read_bytes(), files.certificate.read_bytes())
        except OSError as error:  # replaced since the check
            raise UnreadableFile(f"a file of the certificate cannot be read: {error.strerror}") from None
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the content of files that have changed; None for no change, or files that cannot be used."""
        stamp = self._stamp
        try:
            stamp = self._files.read_stamp()
            if stamp == self._stamp:
                return None
            configuration = self.load()
        except CertificateError as error:
            # A file that cannot be read is tried again at the next handshake; a file that is wrong stays
            # wrong until it changes. The same problem is reported once.
            if not isinstance(error, UnreadableFile):
                self._stamp = stamp
            if str(error) != self._last_message:
                self._last_message = str(error)
                log.error("the changed certificate is not used for gRPC, and the old one stays: %s", error)
            return None
        self._stamp, self._last_message = stamp, ""
        log.info("new gRPC connections use the changed certificate")
        return configuration
