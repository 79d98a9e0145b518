"""Set-up of all logs of the process."""

from __future__ import annotations

import logging
import sys

from fovea.service.settings import Settings


def configure_logs(settings: Settings) -> None:
    """Configure the log of the service, and silence the logs of libraries that clients could fill."""
    _import_structlog()
    from fovea.service.http import access_log

    access_log.configure_logging(settings.log_level, settings.log_format, settings.log_stream)
    # Any client could fill the log through these loggers. Our own log has everything that uvicorn reports.
    for name in ("uvicorn", "python_multipart", "opentelemetry.trace"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _import_structlog() -> None:
    """Import structlog without rich, which it imports if it can, for colours in tracebacks.

    Fovea writes plain tracebacks. The import takes 4 MB and a tenth of a second. Afterwards rich can be
    imported as usual.
    """
    if "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # an import then fails (importlib)
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
