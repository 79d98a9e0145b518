"""The processor of this host, as far as int8 depends on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def describe_processor() -> str:
    """Return the name of the processor and its instructions for int8."""
    name_match = re.search(r"^model name\s*:\s*(.*)$", _read_cpu_info(), re.MULTILINE)
    name = name_match[1].strip() if name_match else platform.machine()
    flags = _read_flags()
    features = [
        feature
        for feature, names in {"AMX": {"amx_int8"}, "VNNI": {"avx512_vnni", "avx_vnni"}}.items()
        if names & flags
    ]
    return f"{name} ({', '.join(features)})" if features else name


def saturates_int8() -> bool:
    """Return whether products of int8 saturate on this processor.

    Without VNNI, x86 adds pairs of 8-bit products in 16 bits (`vpmaddubsw`), which overflows for large
    weights. ARM adds in 32 bits.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return is_x86 and not {"avx512_vnni", "avx_vnni"} & _read_flags()


def _read_flags() -> set[str]:
    flags_match = re.search(r"^flags\s*:\s*(.*)$", _read_cpu_info(), re.MULTILINE)
    return set(flags_match[1].split()) if flags_match else set()


def _read_cpu_info() -> str:
    try:
        return _CPU_INFO.read_text()
    except OSError:  # not Linux
        return ""
