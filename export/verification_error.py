"""The error of an export or import whose result differs from its origin."""

from __future__ import annotations

from fovea.service.errors import FoveaError


class VerificationError(FoveaError):
    """The exported graph computes something else than the network."""
