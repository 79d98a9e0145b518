"""The bound on the memory of all images that are being decoded."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.errors import BadImage, TooManyPixels
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import decode_image
from fovea.service.settings import Settings
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.raw import Wire, classify_request
from tests.servers import ROOT, Server
from tests.service.inference.peaks import estimate_bytes

EXACT = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.EXACT)
FAST = replace(EXACT, pixel_path=PixelPath.FAST)
MAX_PIXELS = 50_000_000
SECONDS = 30
"""Time limit in seconds, longer than any of these tests takes: a wait that reaches it has failed."""


class PeakMemory(DecodeMemory):
    """A memory that records the largest number of bytes in use."""

    peak = 0

    def _wait_for_share(self, size: int) -> None:
        super()._wait_for_share(size)
        with self._condition:
            self.peak = max(self.peak, self.bytes_in_use)


# --- memory of one image -------------------------------------------------------------------------


MEASUREMENT_NOISE = 700_000
"""Bytes that Python itself touches again after the heap was trimmed: a third of a byte per pixel."""


@pytest.fixture(scope="module")
def peaks() -> list[tuple[str, str, int, int]]:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell a process its peak memory")
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.service.inference.peaks"],
        cwd=ROOT, env={**os.environ, **thresholds}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in process.stdout.splitlines()]


@pytest.mark.long
def test_decoding_takes_no_more_than_estimated(peaks: list[tuple[str, str, int, int]]) -> None:
    assert len(peaks) > 60
    assert [peak for peak in peaks if peak[2] > peak[3] + MEASUREMENT_NOISE] == []


@pytest.mark.long
def test_estimate_is_not_far_above_the_peak(peaks: list[tuple[str, str, int, int]]) -> None:
    """An estimate that is too high keeps images waiting for memory that nobody uses."""
    assert [peak for peak in peaks if peak[3] > 4 * peak[2] + 9_000_000] == []


def test_hostile_steps_fit_with_the_largest_images_or_are_refused_by_the_header() -> None:
    limit = Settings(models=ROOT / "zoo").decode_bytes
    resizes = "resize stretch 2800 lanczos, resize cover 2800 box, crop 2800, " * 2
    hostile = Geometry(2800, 2800, parse_steps(f"{resizes} crop 2800, pad 2800"), PixelPath.FAST)
    assert estimate_bytes(make_png_header(7_071, 7_071), hostile) <= limit
    strip = make_png_header(1, 50_000_000)
    cover = Geometry(2800, 2800, parse_steps("resize cover 2800 lanczos, crop 2800"), PixelPath.EXACT)
    assert estimate_bytes(strip, cover) <= limit  # only the part that the crop keeps is resized
    assert estimate_bytes(strip, hostile) > 4 * 2800 * 50_000_000  # between the passes of the first resize


@pytest.mark.parametrize("geometry", [EXACT, FAST], ids=["exact", "fast"])
def test_images_within_the_pixel_limit_fit_by_default(geometry: Geometry) -> None:
    limit = Settings(models=ROOT / "zoo").decode_bytes
    side = 7_071
    webp = encode_image(Image.new("RGBA", (1000, 1000)), "WEBP", lossless=True, method=0, quality=0)
    for mode, colour in ((8, 6), (16, 0), (8, 4)):
        header = bytearray(make_png_header(side, side))
        header[24:26] = mode, colour
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
        assert estimate_bytes(bytes(header), geometry) <= limit
    for content in (webp, encode_image(Image.new("RGBA", (1000, 1000)), "AVIF", speed=10)):
        assert 50 * estimate_bytes(content, geometry) <= limit + 100_000_000  # 2 MB of each are not per pixel
    assert estimate_bytes(encode_image(Image.new("L", (1, 50_000)), "PNG"), geometry) < 100_000_000


# --- the bound -----------------------------------------------------------------------------------


def test_large_images_are_decoded_one_at_a_time() -> None:
    content = encode_image(draw_picture(1200, 900), "PNG")
    needed_bytes = estimate_bytes(content, EXACT)
    memory = PeakMemory(needed_bytes * 3 // 2)
    small_image = encode_image(draw_picture(64, 64), "PNG")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(_decode_shape, image, memory) for image in 3 * [content, content, small_image]]
        assert all(future.result(SECONDS) == (224, 224, 3) for future in futures)
    assert needed_bytes <= memory.peak <= memory.limit
    assert memory.bytes_in_use == 0


def _decode_shape(content: bytes, memory: DecodeMemory) -> tuple[int, ...]:
    return decode_image(content, EXACT, max_pixels=MAX_PIXELS, memory=memory).pixels.shape


def test_small_image_fits_beside_a_large_one() -> None:
    memory = DecodeMemory(10)
    with memory.reserve(8), memory.reserve(2):
        assert memory.bytes_in_use == 10
    assert memory.bytes_in_use == 0


def test_small_image_does_not_overtake_a_waiting_large_one() -> None:
    memory, order = DecodeMemory(10), list[str]()

    def reserve_memory(name: str, size: int) -> None:
        with memory.reserve(size):
            order.append(name)

    threads = [
        threading.Thread(target=reserve_memory, args=arguments) for arguments in (("large", 8), ("small", 2))
    ]
    with memory.reserve(5):
        for count, thread in enumerate(threads, 1):
            thread.start()
            _wait_for_queue(memory, count)
        assert order == []  # the small image would fit, but does not overtake the large one
    for thread in threads:
        thread.join(SECONDS)
    assert order == ["large", "small"]
    assert memory.bytes_in_use == 0


def _wait_for_queue(memory: DecodeMemory, length: int) -> None:
    with memory._condition:  # a thread that joins the queue notifies the others
        assert memory._condition.wait_for(lambda: len(memory._queue) == length, SECONDS)


def test_image_above_the_memory_limit_is_refused() -> None:
    content, memory = encode_image(draw_picture(1200, 900), "PNG"), DecodeMemory(1_000_000)
    needed_bytes = estimate_bytes(content, EXACT)
    with pytest.raises(
        TooManyPixels, match=rf"takes {needed_bytes} bytes .* at most 1000000 \(by FOVEA_DECODE_BYTES\)"
    ):
        _decode_shape(content, memory)
    assert memory.bytes_in_use == 0


@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_all_reservations_succeed_within_the_limit(sizes: list[int]) -> None:
    memory = PeakMemory(10)

    def reserve_memory(size: int) -> None:
        with memory.reserve(size):
            pass

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(reserve_memory, size) for size in sizes]:
            future.result(SECONDS)
    assert memory.bytes_in_use == 0
    assert memory.peak <= 10


def test_memory_is_released_after_errors() -> None:
    memory = DecodeMemory(1 << 30)
    png = encode_image(draw_picture(300, 200), "PNG")
    for content in (
        png[: len(png) // 2],
        make_jpeg(300, 200)[:2000],
        encode_image(Image.new("F", (40, 40)), "TIFF"),
    ):
        with pytest.raises(BadImage):
            _decode_shape(content, memory)
        assert memory.bytes_in_use == 0


@pytest.mark.parametrize("kept_share", [0.5, 1.0], ids=["truncated", "of a mode without a rule"])
def test_error_keeps_no_reference_to_the_image(kept_share: float) -> None:
    content = encode_image(Image.new("F", (40, 40)), "TIFF")
    with pytest.raises(BadImage) as error_info:
        _decode_shape(content[: int(kept_share * len(content))], DecodeMemory(1 << 30))
    assert [
        value for frame in _list_frames(error_info.value) for value in frame.values() if _is_image(value)
    ] == []


def _is_image(value: object) -> bool:
    return isinstance(value, Image.Image)


def _list_frames(error: BaseException | None) -> Iterator[dict[str, object]]:
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            yield trace.tb_frame.f_locals
            trace = trace.tb_next
        error = error.__cause__ or error.__context__


@pytest.mark.long
def test_service_refuses_images_above_the_memory_setting(small_zoo: object) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DECODE_BYTES="2000000") as server:
        reply = server.client.post("/v1/classify", content=encode_image(draw_picture(1000, 900), "PNG"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_many_pixels")
        assert "FOVEA_DECODE_BYTES" in reply.json()["error"]["message"]
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200


# --- several processes ---------------------------------------------------------------------------

OTHER_PROCESS_CODE = """
import sys
from fovea.service.inference.decode_memory import DecodeMemory
memory = DecodeMemory(800, processes=2, lock_descriptor=int(sys.argv[1]))
for line in sys.stdin:
    with memory.reserve(int(line)):
        print("held", flush=True)
"""


def test_large_images_wait_for_other_processes() -> None:
    lock = os.memfd_create("lock")
    memory = DecodeMemory(800, processes=2, lock_descriptor=lock)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS_CODE, str(lock)],
        cwd=ROOT, pass_fds=[lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")
        assert memory.limit == 600
        with memory.reserve(600):
            process.stdin.write("100\n")
            process.stdin.flush()
            assert process.stdout.readline() == "held\n"
            process.stdin.write("101\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 0.3)[0] == []
        assert process.stdout.readline() == "held\n"
        process.stdin.close()
    os.close(lock)


def test_memory_of_a_dead_process_is_released() -> None:
    lock = os.memfd_create("lock")
    code = "import os; from fovea.service.inference.decode_memory import DecodeMemory\n"
    code += f"with DecodeMemory(800, processes=2, lock_descriptor={lock}).reserve(500): os._exit(0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, pass_fds=[lock], check=True)
    with DecodeMemory(800, processes=2, lock_descriptor=lock).reserve(500):
        pass
    os.close(lock)


def test_allocator_memory_is_released_after_small_images() -> None:
    release_count = 0

    def count_release() -> None:
        nonlocal release_count
        release_count += 1

    memory = DecodeMemory(100 << 20, release_memory=count_release)

    def reserve_memory(size: int, times: int = 1) -> int:
        for _ in range(times):
            with memory.reserve(size):
                pass
        return release_count

    assert reserve_memory(1000, 100) == 0
    assert reserve_memory(5 << 20) == 0
    assert reserve_memory(1000, 15) == 0
    assert reserve_memory(5 << 20) == 0
    assert reserve_memory(1000, 15) == 0
    assert reserve_memory(1000, 100) == 1


COUNT_GARBAGE_CODE = """
import gc, signal, sys

def count(*_):
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    items = [item for item in gc.garbage if type(item).__module__.startswith("fovea.service")]
    names = sorted(type(item).__qualname__ for item in items)
    print("garbage", len(items), *names, file=sys.stderr, flush=True)
    gc.set_debug(0)
    gc.garbage.clear()

if "fovea.service" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, count)
"""


@pytest.mark.long
def test_requests_leave_no_reference_cycles(small_zoo: Path, tmp_path: Path) -> None:
    """With many connections a full collection blocks the event loop for 30 ms; before it, memory grows."""
    (tmp_path / "sitecustomize.py").write_text(COUNT_GARBAGE_CODE)
    python_path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_IMAGE_PIXELS="10000", PYTHONPATH=python_path) as server:
        bodies = [
            make_jpeg(),
            make_jpeg(200, 200),
            b"",
            b"none",
            encode_image(draw_picture(90, 90), "BMP") + bytes(100_000),
        ]

        def send_requests() -> None:
            for body in bodies:
                server.client.post("/v1/classify", content=body)
                server.client.post("/v1/classify", files={"file": body})
                server.client.post("/v1/models/none/classify", content=body)
                with Wire(server.url) as wire:
                    wire.send(classify_request(body), classify_request(body)[:-1])

        send_requests()  # the first round creates objects that stay
        server.process.send_signal(signal.SIGUSR1)
        for _ in range(5):
            send_requests()
        server.wait_for_metric(1, "fovea_requests_in_flight")
        server.process.send_signal(signal.SIGUSR1)
        server.client.get("/health/live")
    _, garbage_count = re.findall(r"garbage (\d+)", server.log)
    assert garbage_count == "0", server.log
