"""A process that updates the copy of a store once: `python -m … URI FOLDER`.

The packages of the stores take 50 to 100 MB and have event loops of their own, so neither is in the service's
process. The result is one line of JSON. The process ends when its standard input is closed, so it never
outlives the service.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path


def main() -> None:
    """Update the copy and print the result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        os.nice(10)
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    from fovea.service.errors import FoveaError, to_one_line
    from fovea.service.remote import store
    from fovea.service.rollout.store_copy import StoreCopy

    store.log.addHandler(Collector())
    store.log.propagate = False
    uri, folder = sys.argv[1:]
    try:
        report = StoreCopy(store.open_store(uri), Path(folder)).update()
        result = {**report._asdict(), "error": None, "warnings": warnings}
    except FoveaError as error:
        result = {"error": to_one_line(error), "warnings": warnings}
    except Exception as error:  # of a store's package
        result = {"error": f"{type(error).__name__}: {to_one_line(error)}", "warnings": warnings}
    # The packages of stores have threads that may not end.
    os.write(1, json.dumps(result).encode() + b"\n")
    os._exit(0)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
