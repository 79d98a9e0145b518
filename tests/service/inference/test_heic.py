"""HEIC: the codec of the extra `heic`, and the check of the structure that comes before it."""

from __future__ import annotations

import json
import random
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fovea
from fovea.service.errors import BadImage, RequestError, TooManyPixels, UnsupportedFormat
from fovea.service.inference import heic, image_format
from fovea.service.inference.decode_cost import estimate_cost, read_header
from fovea.service.inference.image_suffixes import has_image_suffix
from fovea.service.inference.preprocess import decode_image, decode_upright, identity_geometry
from tests.heif_boxes import Item, box, build_heif, make_reference, make_size, read_box
from tests.pictures import draw_picture, encode_heic
from tests.servers import DEFAULT_MODEL, Server

LIMIT = 50_000_000


PICTURE = draw_picture(128, 96)
HEIC = encode_heic(PICTURE)


def decode(content: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return decode_upright(content, max_pixels=max_pixels)


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other.convert("RGB"), np.int16)).mean())


# --- pixels --------------------------------------------------------------------------------------


def test_photo_is_decoded() -> None:
    decoded = decode_image(HEIC, identity_geometry(96, 128), max_pixels=LIMIT)
    assert (decoded.format, decoded.width, decoded.height) == ("HEIC", 128, 96)
    assert mean_difference(decode(HEIC), PICTURE) < 4
    assert not decoded.warnings


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_decoded(mode: str) -> None:
    assert mean_difference(decode(encode_heic(PICTURE.convert(mode))), PICTURE.convert(mode)) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_turned_upright_once(orientation: int) -> None:
    """The encoder writes the orientation as properties of the file, as phones do, and leaves EXIF."""
    upright = Image.Image()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = PICTURE.copy()
    stream = BytesIO()
    turned.save(stream, "PNG", exif=exif)
    upright = decode(stream.getvalue())  # as Fovea turns a PNG
    assert mean_difference(decode(encode_heic(PICTURE, orientation)), upright) < 4


def test_orientation_in_exif_alone_does_not_count() -> None:
    turned = encode_heic(PICTURE, 6)
    assert turned.count(b"irot") == 1
    assert decode(turned.replace(b"irot", b"free")).size == PICTURE.size


# --- limits --------------------------------------------------------------------------------------


def test_pixels_are_limited_by_the_header() -> None:
    with pytest.raises(TooManyPixels, match="128 x 96"):
        decode(HEIC, max_pixels=10_000)


def test_cost_is_known_from_the_header() -> None:
    header = read_header(HEIC)
    assert header
    assert (header.format, header.width, header.height) == ("HEIC", 128, 96)
    cost = estimate_cost(HEIC, identity_geometry(96, 128), max_pixels=LIMIT)
    assert cost
    assert cost.memory_bytes > 32 * 128 * 96


def replace_size(content: bytes, width: int, height: int) -> bytes:
    start = content.index(b"ispe") + 8
    return content[:start] + struct.pack(">II", width, height) + content[start + 8 :]


def test_picture_larger_than_its_promise_is_refused() -> None:
    with pytest.raises(BadImage, match="promises 16 x 16 px and contains 128 x 96 px"):
        decode(replace_size(HEIC, 16, 16))


def build_grid(
    rows: int, columns: int, size: tuple[int, int], *, tiles: int, output: tuple[int, int] | None = None,
    kind: bytes = b"grid", tile_kind: bytes = b"hvc1",
) -> bytes:  # fmt: skip
    """Return the head of a file with one grid, of which each tile is the same item, of 128 x 96 px."""
    configuration = read_box(HEIC, b"hvcC")
    grid = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *(output or size))
    item = b"\2\0\0\0"
    meta = box(
        b"meta",
        bytes(4),
        box(b"pitm", bytes(4), struct.pack(">H", 1)),
        box(
            b"iinf", bytes(4), struct.pack(">H", 2),
            box(b"infe", item, struct.pack(">HH", 1, 0), kind, b"\0"),
            box(b"infe", item, struct.pack(">HH", 2, 0), tile_kind, b"\0"),
        ),
        box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH", 1, tiles), struct.pack(">H", 2) * tiles)),
        box(
            b"iprp",
            box(
                b"ipco", configuration,
                box(b"ispe", bytes(4), struct.pack(">II", 128, 96)),
                box(b"ispe", bytes(4), struct.pack(">II", *size)),
            ),
            box(b"ipma", bytes(4), struct.pack(">I", 2), b"\0\1\1\3", b"\0\2\2\1\2"),
        ),
        box(b"idat", grid, bytes(8)),
        box(
            b"iloc", b"\1\0\0\0\x44\0\0\2",
            struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(grid)),
            struct.pack(">HHHHII", 2, 1, 0, 1, len(grid), 8),
        ),
    )  # fmt: skip
    return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + meta


def test_grid_of_tiles_is_checked() -> None:
    heic.check_structure(build_grid(2, 3, (384, 192), tiles=6))
    for content, message in (
        (build_grid(200, 200, (100, 100), tiles=40_000), "more than 20000 boxes and entries"),
        (build_grid(100, 100, (100, 100), tiles=10_000), "many more pixels than its picture"),
        (build_grid(2, 3, (384, 192), tiles=6, output=(40_000, 40_000)), "another size than its picture"),
        (build_grid(2, 3, (384, 192), tiles=5), "its grid has 5 tiles"),
        (build_grid(2, 3, (384, 192), tiles=6, kind=b"iovl"), "of the kind 'iovl'"),
        (build_grid(2, 3, (384, 192), tiles=6, tile_kind=b"grid"), "grid of something else"),
    ):
        with pytest.raises(BadImage, match=message):
            heic.check_structure(content)


TINY = encode_heic(PICTURE.resize((16, 16)))
CODED, TINY_CODED = (read_box(content, b"mdat")[8:] for content in (HEIC, TINY))


def read_parameters(configuration: bytes) -> list[bytes]:
    """Return the units in a box `hvcC`."""
    position, units = 31, []
    for _ in range(configuration[30]):
        count = struct.unpack_from(">H", configuration, position + 1)[0]
        position += 3
        for _ in range(count):
            length = struct.unpack_from(">H", configuration, position)[0]
            units.append(configuration[position + 2 : position + 2 + length])
            position += 2 + length
    return units


def build_tiny(coded: bytes, configuration: bytes = read_box(TINY, b"hvcC")) -> bytes:
    return build_heif(b"heic", [Item(b"hvc1", coded, (1, 2))], [configuration, make_size(16, 16)])


def test_larger_parameters_are_found_wherever_the_decoder_finds_them() -> None:
    heic.check_structure(build_tiny(TINY_CODED))
    units = read_parameters(read_box(HEIC, b"hvcC"))
    with_lengths = b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
    (tiny_sps,) = (one for one in read_parameters(read_box(TINY, b"hvcC")) if one[0] >> 1 == 33)
    lists = b"".join(
        bytes([kind]) + struct.pack(">HH", 1, len(unit)) + unit
        for kind, unit in [(33, tiny_sps), *((39, unit) for unit in units)]  # a list of remarks, it says
    )
    configuration = box(b"hvcC", read_box(TINY, b"hvcC")[8:30], bytes([len(units) + 1]), lists)
    assert len(read_parameters(configuration)) == len(units) + 1
    for content in (build_tiny(with_lengths + CODED), build_tiny(CODED, configuration)):
        with pytest.raises(BadImage, match="promises 16 x 16 px and contains 128 x 96 px"):
            heic.check_structure(content)


def test_lengths_that_codecs_read_differently_are_refused() -> None:
    configuration = bytearray(read_box(TINY, b"hvcC"))
    configuration[29] = configuration[29] & 0xFC | 1
    with pytest.raises(BadImage, match="not of 4 bytes"):
        heic.check_structure(build_tiny(TINY_CODED, bytes(configuration)))


def test_second_description_of_the_picture_is_refused() -> None:
    with pytest.raises(BadImage, match="several boxes `meta`"):
        heic.check_structure(TINY + read_box(HEIC, b"meta"))


def test_mask_that_leads_to_a_larger_picture_is_refused() -> None:
    alpha = box(b"auxC", bytes(4), b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0")
    properties = [read_box(TINY, b"hvcC"), make_size(16, 16), read_box(HEIC, b"hvcC"), alpha]
    items = [Item(b"hvc1", TINY_CODED, (1, 2)), Item(b"iden", b"", (2, 4)), Item(b"hvc1", CODED, (3, 2))]
    references = [make_reference(b"auxl", 2, 1), make_reference(b"dimg", 2, 3)]
    with pytest.raises(BadImage, match="of the kind 'iden'; hvc1 and grid are served"):
        heic.check_structure(build_heif(b"heic", items, properties, references))


@pytest.mark.parametrize(
    ("aperture", "is_refused"),
    [
        ((128, 1, 96, 1), False),
        ((257, 2, 90, 1), True),
        ((128, 1, 97, 1), True),
        ((0, 1, 96, 1), True),
        ((64, 0, 96, 1), True),
    ],
)
def test_clean_aperture_is_a_part_of_the_picture(
    aperture: tuple[int, int, int, int], is_refused: bool
) -> None:
    """libheif says that a picture is as large as its aperture, whatever the size."""
    clap = box(b"clap", struct.pack(">8I", *aperture, 0, 1, 0, 1))
    properties = [read_box(HEIC, b"hvcC"), make_size(128, 96), clap]
    content = build_heif(b"heic", [Item(b"hvc1", CODED, (1, 2, 3))], properties)
    if is_refused:
        with pytest.raises(BadImage, match=r"its clean aperture \(clap\) is not a part of its picture"):
            heic.check_structure(content)
    else:
        heic.check_structure(content)


def test_picture_that_is_scaled_afterwards_is_refused() -> None:
    scaling = box(b"iscl", bytes(4), struct.pack(">4H", 9, 1, 9, 1))
    properties = [read_box(HEIC, b"hvcC"), make_size(128, 96), scaling]
    with pytest.raises(BadImage, match="asks for another size"):
        heic.check_structure(build_heif(b"heic", [Item(b"hvc1", CODED, (1, 2, 3))], properties))


def test_damaged_files_get_their_own_error() -> None:
    chance = random.Random(0)  # noqa: S311 - the same damage each time
    for length in range(0, len(HEIC) - 1, 37):
        with pytest.raises(RequestError):
            decode(HEIC[:length])
    head = HEIC.index(b"mdat")
    for _ in range(300):
        content = bytearray(HEIC)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(12, head)] = chance.randrange(256)
        try:
            decode(bytes(content), max_pixels=1 << 20)
        except RequestError:
            continue


# --- the extra -----------------------------------------------------------------------------------


def test_without_the_extra_the_error_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heic, "is_available", lambda: False)
    image_format.supported_formats.cache_clear()
    try:
        with pytest.raises(UnsupportedFormat, match=r"HEIC is not served; .*pip install 'fovea-serve\["):
            decode(HEIC)
        assert "HEIC" not in image_format.supported_formats()
    finally:
        monkeypatch.undo()
        image_format.supported_formats.cache_clear()


def test_service_and_python_classify_photos(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.heic"
    photo.write_bytes(encode_heic(PICTURE, 6))
    assert has_image_suffix(photo.name)
    answer = server.client.post("/v1/classify", content=photo.read_bytes()).json()
    assert answer["image"] == {"format": "HEIC", "width": 96, "height": 128}
    boxes = json.dumps([[0, 0, 96, 128], [0, 0, 40, 40]])
    parts = server.client.post(f"/v1/classify?boxes={boxes}", content=photo.read_bytes()).json()
    assert len(parts["boxes"]) == 2
    assert fovea.load(DEFAULT_MODEL).classify(photo).label
