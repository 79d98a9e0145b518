"""The processor on which a benchmark runs."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

_INSTRUCTION_SETS: Final = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
"""Instruction sets that decide how fast a model runs, by their flag in /proc/cpuinfo."""


def describe_processor() -> str:
    """Return the number of usable cores, the processor's name and the instruction sets that matter."""
    name, flags = read_processor()
    sets = ", ".join(title for flag, title in _INSTRUCTION_SETS.items() if flag in flags)
    return f"{len(os.sched_getaffinity(0))} cores of {name} ({sets or 'no vector instructions known'})"


def read_processor() -> tuple[str, frozenset[str]]:
    """Return the name and the flags of the first processor (proc(5))."""
    content = Path("/proc/cpuinfo").read_text()
    name_match = re.search(r"^model name\s*: (.*)$", content, re.MULTILINE)
    flags_match = re.search(r"^(?:flags|Features)\s*: (.*)$", content, re.MULTILINE)
    name = name_match[1] if name_match else platform.machine()
    return name, frozenset(flags_match[1].split() if flags_match else ())
