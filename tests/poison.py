"""Images that harm the runner that decodes them: it dies, raises, misnumbers its report, or hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.runner_code import write_runner_code

EXIT_IMAGE: Final = b"POISON exit"
"""An image that ends the process that decodes it, as the crash of a codec does."""

RAISE_IMAGE: Final = b"POISON raise"
"""An image whose decoding raises an unexpected exception."""

WRONG_NUMBER_IMAGE: Final = b"POISON number"
"""An image whose batch gets a report with a wrong number, as if the stream were out of step."""

_RUNNER_CODE: Final = """
import os

from fovea.service.runners import predictor
from fovea.service.runners import batch_messages

decode = predictor.decode_image
write = batch_messages.BatchReport.to_bytes
misnumbered = []

def write_report(report):
    return write(report._replace(number=report.number + len(misnumbered)))

batch_messages.BatchReport.to_bytes = write_report

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
    """An image that blocks the runner that decodes it until `release`. It is then answered with 415."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self.image = b"POISON wait " + bytes(path)

    def release(self) -> None:
        """Let the runner continue. Block until a runner has begun to decode the image."""
        self._path.open("w").close()


def make_poison_environment(folder: Path) -> dict[str, str]:
    """Return environment variables with which runners react to these images."""
    return write_runner_code(folder, _RUNNER_CODE)
