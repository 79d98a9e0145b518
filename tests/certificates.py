"""Certificates for tests: an authority of their own, by the package trustme."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and of its key."""

    certificate: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        """Settings of a service that uses this pair."""
        return {"FOVEA_TLS_CERT": str(self.certificate), "FOVEA_TLS_KEY": str(self.key)}

    def replace_with(self, other: Pair) -> None:
        """Write the content of another pair into the files of this pair, one after the other."""
        self.certificate.write_bytes(other.certificate.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """An authority that signs certificates for tests."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.file = folder / f"{name}.pem"
        """PEM file with the authority's own certificate."""
        self._authority.cert_pem.write_to_path(self.file)

    def issue(
        self, name: str, *hosts: str, expires_at: datetime | None = None, common_name: str | None = None
    ) -> Pair:
        """Write a certificate and its key to files that begin with `name`. By default it is for localhost."""
        leaf = self._authority.issue_cert(
            *(hosts or ("127.0.0.1", "::1", "localhost")),
            not_before=datetime(2020, 1, 1, tzinfo=UTC),
            not_after=expires_at,
            common_name=common_name,
        )
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))
        pair.key.write_bytes(leaf.private_key_pem.bytes())
        return pair

    def trust(self, client: Pair | None = None) -> ssl.SSLContext:
        """Return what a client needs that trusts this authority, with a certificate of its own or without."""
        context = ssl.create_default_context(cafile=self.file)
        if client:
            context.load_cert_chain(client.certificate, client.key)
        return context
