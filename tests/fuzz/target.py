"""A fuzz target: a check that every input must pass, and inputs to begin with."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

TARGETS: Final = (
    "http_requests",
    "header_values",
    "multipart_forms",
    "json_bodies",
    "tensor_bodies",
    "image_files",
    "onnx_files",
    "contracts",
    "process_frames",
    "keys_files",
    "grpc_messages",
)
"""Modules of this folder that define a `TARGET`."""

CORPUS: Final = Path(__file__).parent / "corpus"
"""Folder with kept inputs, one folder for each target. Each input reaches code that no other one reaches."""

Mutate: TypeAlias = Callable[[bytes, random.Random], bytes]
"""Return a changed input."""


@dataclass(frozen=True)
class Target:
    """A parser of the service, and how to look for inputs that it does not expect."""

    check: Callable[[bytes], bool]
    """Parse one input as the service does, and check the result. Return True if the input was accepted, and
    False if it was refused as documented. Any exception is a finding."""
    make_seeds: Callable[[], list[bytes]]
    """Return inputs that are accepted. All other inputs come from these."""
    mutate: Mutate | None = None
    """A change that keeps the structure of an input; every second change is one of single bytes."""
    words: tuple[bytes, ...] = ()
    """Words of the format, which libFuzzer inserts."""
    max_size: int = 4096
    """Largest input in bytes."""


def load_target(name: str) -> Target:
    """Import the module of a target."""
    target = importlib.import_module(f"tests.fuzz.{name}").TARGET
    if not isinstance(target, Target):
        raise TypeError(f"tests.fuzz.{name} has no target")
    return target


def list_kept_inputs(name: str) -> list[Path]:
    """Return the kept inputs of a target."""
    return sorted((CORPUS / name).glob("*"))


def require(condition: bool, finding: str) -> None:
    """Raise `AssertionError` unless the condition holds; `assert` would vanish under `python -O`."""
    if not condition:
        raise AssertionError(finding)
