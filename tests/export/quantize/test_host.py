"""The processor decides whether int8 saturates."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from fovea.export.quantize import host


@pytest.mark.parametrize(
    ("machine", "flags", "saturates", "name"),
    [
        ("x86_64", "sse2 avx2 fma", True, "Fast CPU"),
        ("x86_64", "avx2 avx512_vnni amx_int8", False, "Fast CPU (AMX, VNNI)"),
        ("x86_64", "avx2 avx_vnni", False, "Fast CPU (VNNI)"),
        ("aarch64", "", False, "Fast CPU"),
    ],
)
def test_int8_saturates_on_x86_without_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, saturates: bool, name: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(host, "_CPU_INFO", path)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host.saturates_int8() is saturates
    assert host.describe_processor() == name


def test_host_without_cpuinfo_is_named_by_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_CPU_INFO", tmp_path / "nothing")
    assert host.describe_processor() == platform.machine()
