"""The images that are kept for the shadow test of the next version."""

from __future__ import annotations

from fovea.service.runners.batch_messages import ImageRequest
from fovea.service.runners.shared_memory import SharedRef
from fovea.service.serving.recent_images import RecentImages


def copy_body(ref: SharedRef) -> bytes:
    return b"stored at %d" % ref.offset


def test_latest_images_are_kept_up_to_the_limit() -> None:
    recent_images = RecentImages(4, copy_body)
    for number in range(3):
        recent_images.add_image(b"%d" % number)
    assert recent_images.images == [b"0", b"1", b"2"]
    for number in range(3, 9):
        recent_images.add_image(b"%d" % number)
    assert recent_images.images == [b"1", b"2", b"3", b"4"], "when it is full, one in a while is enough"
    recent_images._next_time = 0.0
    recent_images.add_image(b"9")
    assert recent_images.images == [b"2", b"3", b"4", b"9"]


def test_images_are_limited_in_size_and_in_total_size() -> None:
    recent_images = RecentImages(64, copy_body)
    recent_images.add_image(bytes((4 << 20) + 1))
    assert recent_images.images == []
    for _ in range(20):
        recent_images._next_time = 0.0
        recent_images.add_image(bytes(3 << 20))
    assert len(recent_images.images) == 5


def test_kept_images_are_copies() -> None:
    content = bytearray(b"sent")
    recent_images = RecentImages(4, copy_body)
    recent_images.add_image(memoryview(content))
    recent_images.add_image(SharedRef(7, 3))
    content[:] = b"gone"
    assert recent_images.images == [b"sent", b"stored at 7"]


def test_limit_of_zero_keeps_no_images() -> None:
    recent_images = RecentImages(0, copy_body)
    recent_images.add_image(b"image")
    assert recent_images.images == []


def test_rows_of_tensors_are_not_kept() -> None:
    """The next version may accept other tensors."""
    recent_images = RecentImages(4, copy_body)
    recent_images.add_image(ImageRequest(b"row", "pixels"))
    recent_images.add_image(ImageRequest(b"image", include_logits=True))
    recent_images.add_image(ImageRequest(SharedRef(7, 3)))
    assert recent_images.images == [b"image", b"stored at 7"]
