"""Images that harm the runner that works on them: one that dies, one that raises, one that hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.servers import ROOT

EXIT_IMAGE: Final = b"POISON exit"
"""The process that decodes it ends, as of a codec's crash."""

RAISE_IMAGE: Final = b"POISON raise"
"""What decodes it raises what nobody expects."""

WRONG_NUMBER_IMAGE: Final = b"POISON number"
"""The report of its batch has the number of another one, as if the stream were out of step."""

_SITECUSTOMIZE: Final = """
import os, sys

if "runners.process" in " ".join(sys.orig_argv):
    from fovea.service.runners import predictor
    from fovea.service.runners import messages

    decode = predictor.decode_image
    write = messages.BatchReport.to_bytes
    misnumbered = []

    def write_report(report):
        return write(report._replace(batch_number=report.batch_number + len(misnumbered)))

    messages.BatchReport.to_bytes = write_report

    def poisoned(image, *arguments, **named):
        match bytes(image[:999]).decode("latin-1").split(" "):
            case ["POISON", "exit"]:
                os._exit(9)
            case ["POISON", "raise"]:
                raise ArithmeticError("raised on purpose")
            case ["POISON", "number"]:
                misnumbered.append(image)
            case ["POISON", "wait", path]:
                open(path).close()
        return decode(image, *arguments, **named)

    predictor.decode_image = poisoned
"""


class BlockingImage:
    """An image that is not decoded before it is opened; then it is none, and gets 415."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self.image = b"POISON wait " + bytes(path)

    def release(self) -> None:
        """Let it go on, once a runner is at it."""
        self._path.open("w").close()


def make_poison_environment(folder: Path) -> dict[str, str]:
    """The environment in which runners fall for these images."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
