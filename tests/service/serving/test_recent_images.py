"""The images that are kept for the shadow test of the next version."""

from __future__ import annotations

from fovea.service.runners.batch_messages import ImageRequest
from fovea.service.runners.shared_memory import SharedRef
from fovea.service.serving.recent_images import RecentImages


def copy_body(ref: SharedRef) -> bytes:
    return b"stored at %d" % ref.offset


def test_the_last_ones_are_kept_and_no_more_than_told() -> None:
    replay = RecentImages(4, copy_body)
    for number in range(3):
        replay.add_image(b"%d" % number)
    assert replay.images == [b"0", b"1", b"2"]
    for number in range(3, 9):
        replay.add_image(b"%d" % number)
    assert replay.images == [b"1", b"2", b"3", b"4"], "when it is full, one in a while is enough"
    replay._next_time = 0.0
    replay.add_image(b"9")
    assert replay.images == [b"2", b"3", b"4", b"9"]


def test_they_take_sixteen_megabytes_and_none_takes_four() -> None:
    replay = RecentImages(64, copy_body)
    replay.add_image(bytes((4 << 20) + 1))
    assert replay.images == []
    for _ in range(20):
        replay._next_time = 0.0
        replay.add_image(bytes(3 << 20))
    assert len(replay.images) == 5


def test_they_are_copies_wherever_they_lie() -> None:
    content = bytearray(b"sent")
    replay = RecentImages(4, copy_body)
    replay.add_image(memoryview(content))
    replay.add_image(SharedRef(7, 3))
    content[:] = b"gone"
    assert replay.images == [b"sent", b"stored at 7"]


def test_none_are_kept_if_told_so() -> None:
    replay = RecentImages(0, copy_body)
    replay.add_image(b"image")
    assert replay.images == []


def test_rows_of_tensors_are_not_kept() -> None:
    """The next version may accept other tensors."""
    replay = RecentImages(4, copy_body)
    replay.add_image(ImageRequest(b"row", "pixels"))
    replay.add_image(ImageRequest(b"image", include_logits=True))
    replay.add_image(ImageRequest(SharedRef(7, 3)))
    assert replay.images == [b"image", b"stored at 7"]
