"""Replies as gzip: only for requests that take it, and each content is compressed once."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from fovea.service.http.compression import Compressor, accepts_gzip


@pytest.mark.parametrize(
    "header",
    [
        "gzip",
        "GZIP",
        "gzip, deflate, br",
        "br;q=1.0, gzip;q=0.8, *;q=0.1",
        "*",
        "gzip; q=0.001",
        "gzip;q=x",
        "gzip;v=1",
    ],
)
def test_gzip_is_accepted(header: str) -> None:
    assert accepts_gzip(header.encode())


@pytest.mark.parametrize(
    "header", ["", "identity", "br", "gzip;q=0", "gzip;q=0.000", "*;q=0", "gzip;q=0, *", "x-gzip", ",;,"]
)
def test_gzip_is_not_accepted(header: str) -> None:
    assert not accepts_gzip(header.encode())


def make_content(seed: int) -> bytes:
    return f"{seed} ".encode() * 5000


def test_content_is_compressed_once() -> None:
    async def compress_twice() -> tuple[bytes, bytes]:
        compressor = Compressor()
        return await compressor.compress(make_content(1)), await compressor.compress(make_content(1))

    first, second = asyncio.run(compress_twice())
    assert first is second
    assert gzip.decompress(first) == make_content(1)


def test_least_recently_used_content_is_dropped() -> None:
    async def find_kept() -> list[bool]:
        compressor = Compressor(max_bytes=25_000)  # two contents
        compressed = {seed: await compressor.compress(make_content(seed)) for seed in (1, 2)}
        assert await compressor.compress(make_content(1)) is compressed[1]
        await compressor.compress(make_content(3))
        return [await compressor.compress(make_content(seed)) is compressed[seed] for seed in (1, 2)]

    assert asyncio.run(find_kept()) == [True, False]


def test_content_above_the_limit_is_compressed_and_not_kept() -> None:
    async def compress_twice() -> tuple[bytes, bytes]:
        compressor = Compressor(max_bytes=100)
        return await compressor.compress(make_content(1)), await compressor.compress(make_content(1))

    first, second = asyncio.run(compress_twice())
    assert first == second
    assert first is not second
