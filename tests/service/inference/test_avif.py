"""AVIF: the check of the structure that comes before the codec."""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image

from fovea.service.errors import BadImage
from fovea.service.inference import avif
from fovea.service.inference.preprocess import decode_upright
from tests.heif_boxes import Item, box, build_heif, make_reference, make_size, read_box
from tests.pictures import draw_picture, encode_image

WIDTH, HEIGHT = 600, 400
PICTURE = draw_picture(WIDTH, HEIGHT)
AVIF = encode_image(PICTURE, "AVIF", speed=10)
CODED = read_box(AVIF, b"mdat")[8:]
PARAMETERS = read_box(AVIF, b"av1C")
ALPHA = box(b"auxC", bytes(4), b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0")
TINY = encode_image(PICTURE.resize((16, 16)), "AVIF", speed=10)
TINY_CODED = read_box(TINY, b"mdat")[8:]


def encode_film(size: tuple[int, int]) -> bytes:
    frames = [Image.new("RGB", size, (value, 0, 0)) for value in (0, 100, 200)]
    stream = BytesIO()
    frames[0].save(stream, "AVIF", save_all=True, append_images=frames[1:], duration=100)
    return stream.getvalue()


def decode(content: bytes) -> Image.Image:
    return decode_upright(content, max_pixels=50_000_000)


# --- files that are served -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("options", [{}, {"quality": 100, "subsampling": "4:4:4"}, {"tile_rows": 1}])
def test_pictures_are_decoded(mode: str, options: dict[str, object]) -> None:
    content = encode_image(PICTURE.convert(mode), "AVIF", speed=10, **options)
    assert decode(content).size == PICTURE.size
    assert decode(content + b"\xff" * 50).size == PICTURE.size  # libavif does not read on


def test_first_frame_of_a_film_is_decoded() -> None:
    assert decode(encode_film((WIDTH, HEIGHT))).size == PICTURE.size


def test_built_file_is_decoded() -> None:
    """The other tests change it: it must be sound itself."""
    items = [Item(b"av01", CODED, (1, 2)), Item(b"av01", CODED, (1, 2, 3))]
    properties = [PARAMETERS, make_size(WIDTH, HEIGHT), ALPHA]
    content = build_heif(b"avif", items, properties, [make_reference(b"auxl", 2, 1)])
    avif.check_structure(content, (WIDTH, HEIGHT))


# --- files that contain more than they promise ---------------------------------------------------


def test_picture_larger_than_its_promise_is_refused() -> None:
    """libavif would decode 600 x 400 pixels and make them small: with 16384 x 16384 that takes 500 MB."""
    start = AVIF.index(b"ispe") + 8
    content = AVIF[:start] + struct.pack(">II", 16, 16) + AVIF[start + 8 :]
    with pytest.raises(BadImage, match="promises 16 x 16 px and contains 600 x 400 px"):
        decode(content)


def test_film_larger_than_its_promise_is_refused() -> None:
    film = encode_film((WIDTH, HEIGHT))
    assert read_box(film, b"stsz")
    avif.check_structure(film, (WIDTH, HEIGHT))
    with pytest.raises(BadImage, match="promises 16 x 16 px and contains 600 x 400 px"):
        avif.check_structure(film, (16, 16))
    without_meta = film.replace(b"meta", b"free")
    with pytest.raises(BadImage, match="promises 16 x 16 px"):
        avif.check_structure(without_meta, (16, 16))


def test_larger_picture_behind_a_small_one_is_refused() -> None:
    content = build_heif(
        b"avif", [Item(b"av01", TINY_CODED + CODED, (1, 2))], [PARAMETERS, make_size(16, 16)]
    )
    with pytest.raises(BadImage, match="promises 16 x 16 px and contains 600 x 400 px"):
        avif.check_structure(content, (16, 16))


@pytest.mark.parametrize("target", [1, 2])
def test_larger_mask_is_refused(target: int) -> None:
    """The mask of a tile is decoded as that of the picture is."""
    grid = struct.pack(">BBBBHH", 0, 0, 0, 0, 64, 64)
    items = [
        Item(b"grid", grid, (4,)), Item(b"av01", TINY_CODED, (1, 4)), Item(b"av01", CODED, (1, 2, 3)),
    ]  # fmt: skip
    properties = [PARAMETERS, make_size(WIDTH, HEIGHT), ALPHA, make_size(64, 64)]
    references = [make_reference(b"dimg", 1, 2)]
    avif.check_structure(build_heif(b"avif", items, properties, references), (64, 64))
    references.append(make_reference(b"auxl", 3, target))
    with pytest.raises(BadImage, match="masks that are larger than its picture"):
        avif.check_structure(build_heif(b"avif", items, properties, references), (64, 64))


def test_chain_of_masks_is_refused_for_its_sum() -> None:
    size = make_size(WIDTH, HEIGHT)
    items = [Item(b"av01", CODED, (1, 2)), *(Item(b"av01", CODED, (1, 2, 3)) for _ in range(20))]
    references = [make_reference(b"auxl", number, number - 1) for number in range(2, 22)]
    with pytest.raises(BadImage, match="masks that are larger than its picture"):
        avif.check_structure(
            build_heif(b"avif", items, [PARAMETERS, size, ALPHA], references), (WIDTH, HEIGHT)
        )


ITEM = Item(b"av01", TINY_CODED, (1, 2))
PROPERTIES = [PARAMETERS, make_size(16, 16)]


@pytest.mark.parametrize(
    "further",
    [
        box(b"pitm", bytes(4), b"\0\2"),
        box(b"iinf", bytes(4), b"\0\0"),
        box(b"iloc", b"\0\0\0\0\x44\0\0\0"),
        box(b"iprp", box(b"ipco")),
        box(b"idat"),
        box(b"iref", bytes(4)),
    ],
    ids=lambda content: content[4:8].decode(),
)
def test_box_that_is_there_twice_is_refused(further: bytes) -> None:
    """Codecs differ in which of them counts."""
    references = [make_reference(b"thmb", 1, 1)]
    avif.check_structure(build_heif(b"avif", [ITEM], PROPERTIES, references), (16, 16))
    again = [further, further] if further[4:8] == b"idat" else [further]
    content = build_heif(b"avif", [ITEM], PROPERTIES, references, further=again)
    with pytest.raises(BadImage, match="several boxes"):
        avif.check_structure(content, (16, 16))


def test_second_description_of_an_item_is_refused() -> None:
    content = build_heif(b"avif", [ITEM, ITEM], PROPERTIES, [make_reference(b"dimg", 1, 2)] * 2)
    with pytest.raises(BadImage, match="the item 1 has several lists of pictures"):
        avif.check_structure(content, (16, 16))
    once = build_heif(b"avif", [ITEM, ITEM], PROPERTIES)
    changes: list[tuple[Callable[[bytes], bytes], str]] = [
        (lambda text: text.replace(b"\2\0\0\0\0\2\0\0av01", b"\2\0\0\0\0\1\0\0av01"), "several kinds"),
        (lambda text: text.replace(b"\0\2\2\1\2", b"\0\1\2\1\2"), "several lists of properties"),
        (lambda text: text.replace(b"\0\2\0\0\0\1", b"\0\1\0\0\0\1"), "several places"),
    ]
    for change, message in changes:
        content = change(once)
        assert content != once
        with pytest.raises(BadImage, match=message):
            avif.check_structure(content, (16, 16))
    with pytest.raises(BadImage, match="several boxes `meta`"):
        avif.check_structure(once + read_box(once, b"meta"), (16, 16))


# --- the headers of AV1 --------------------------------------------------------------------------


class BitWriter:
    """Writes the fields of a header."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, *fields: tuple[int, int]) -> BitWriter:
        """Add numbers, each with its count of bits."""
        for value, count in fields:
            self._text += format(value, f"0{count}b")
        return self

    def make_unit(self, kind: int) -> bytes:
        text = self._text + "1" + "0" * (-(len(self._text) + 1) % 8)
        content = int(text, 2).to_bytes(len(text) // 8)
        return bytes([kind << 3 | 2, len(content)]) + content


def write_sequence(*, timing: bool, frame_ids: bool, tools: int | None) -> bytes:
    """Return a sequence header of 16 x 16 px with 16 bits for each side; `tools` is None if frames choose."""
    bits = BitWriter().add((0, 3), (0, 1), (0, 1))
    if timing:
        bits.add((1, 1), (1, 32), (1, 32), (0, 1), (1, 1), (9, 5), (1, 32), (3, 5), (7, 5))
        bits.add((1, 1), (0, 5), (0, 12), (9, 5), (1, 1), (1, 1), (0, 21), (1, 1), (0, 4))
    else:
        bits.add((0, 1), (0, 1), (0, 5), (0, 12), (0, 5))
    bits.add((15, 4), (15, 4), (15, 16), (15, 16))
    bits.add((1, 1), (2, 4), (1, 3)) if frame_ids else bits.add((0, 1))
    bits.add((0, 7), (1, 1), (0, 2))
    bits.add((1, 1)) if tools is None else bits.add((0, 1), (tools, 1))
    if tools != 0:
        bits.add((1, 1))
    return bits.make_unit(1)


@pytest.mark.parametrize("timing", [True, False])
@pytest.mark.parametrize("frame_ids", [True, False])
@pytest.mark.parametrize("tools", [None, 0, 1])
def test_frame_with_a_size_of_its_own_is_refused(timing: bool, frame_ids: bool, tools: int | None) -> None:
    """The decoder takes the size in the frame, whatever the sequence header says."""
    sequence = write_sequence(timing=timing, frame_ids=frame_ids, tools=tools)
    for has_own_size in (0, 1):
        # Shown key frame, then a key frame that is not shown.
        shown = BitWriter().add((0, 1), (0, 2), (1, 1))
        if timing:
            shown.add((5, 8))
        hidden = BitWriter().add((0, 1), (0, 2), (0, 1), (1, 1), (1, 1))
        for frame in (shown, hidden):
            frame.add((1, 1))
            if tools is None:
                frame.add((1, 1))
            if tools != 0:
                frame.add((1, 1))
            if frame_ids:
                frame.add((9, 6))
            frame.add((has_own_size, 1))
            item = Item(b"av01", sequence + frame.make_unit(6), (1, 2))
            content = build_heif(b"avif", [item], PROPERTIES)
            if has_own_size:
                with pytest.raises(BadImage, match="promises 16 x 16 px and contains 65536 x 65536 px"):
                    avif.check_structure(content, (16, 16))
            else:
                avif.check_structure(content, (16, 16))


def test_damaged_units_are_refused() -> None:
    sequence = write_sequence(timing=False, frame_ids=False, tools=0)
    frame = BitWriter().add((0, 1), (0, 2), (1, 1), (0, 1), (0, 1)).make_unit(6)
    for coded, message in (
        (frame, "comes before its sequence header"),
        (sequence + frame * 33, "a picture has 33 frames"),
        (sequence[:-1], "ends within a picture"),
        (b"\x0a\x00", "parameters end too early"),
        (b"\x12\x00", "the size of its coded picture is missing"),
        (b"\x12\x00" * 20_000, "more than 20000 boxes and entries"),
    ):
        content = build_heif(b"avif", [Item(b"av01", coded, (1, 2))], PROPERTIES)
        with pytest.raises(BadImage, match=message):
            avif.check_structure(content, (16, 16))
