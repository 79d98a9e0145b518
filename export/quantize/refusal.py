"""The error of a quantization that is refused."""

from __future__ import annotations

from fovea.service.errors import FoveaError


class QuantizeRefused(FoveaError):
    """The model cannot be quantized, or no conversion passed; the message says what to do."""
