"""Steps of a geometry: their text, their limits, and old contracts in the new layout."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.geometry import (
    MAX_SIDE,
    MIN_FRACTION,
    AspectCropStep,
    AspectPadStep,
    CropStep,
    Fit,
    FractionCropStep,
    Geometry,
    Interpolation,
    PadStep,
    PixelPath,
    ResizeStep,
    Rounding,
    Step,
    find_last_size,
)
from fovea.service.artifact.geometry_text import format_steps, parse_steps
from fovea.service.artifact.geometry_upgrade import read_geometry, to_plain_geometry
from fovea.service.errors import ContractError
from tests.graphs import build_model, read_contract

SIDES = st.integers(1, MAX_SIDE)
COLOURS = st.integers(0, 255)
WHOLE = st.sampled_from([Rounding.FLOOR, Rounding.ROUND])

STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        ResizeStep,
        st.sampled_from([Fit.COVER, Fit.CONTAIN]),
        SIDES,
        SIDES,
        st.sampled_from(Interpolation),
        WHOLE,
    ),
    st.builds(
        ResizeStep, st.just(Fit.STRETCH), SIDES, SIDES, st.just(Interpolation.BILINEAR),
        st.just(Rounding.FLOOR), st.booleans(),
    ),
    st.builds(CropStep, SIDES, SIDES, WHOLE),
    st.builds(AspectCropStep, SIDES, SIDES, st.sampled_from(Rounding)),
    st.builds(FractionCropStep, st.floats(MIN_FRACTION, 1, exclude_max=True)),
    st.builds(AspectPadStep, SIDES, SIDES, st.tuples(COLOURS, COLOURS, COLOURS)),
    st.builds(PadStep, SIDES, SIDES, st.tuples(COLOURS, COLOURS, COLOURS), WHOLE),
)  # fmt: skip


# --- text ----------------------------------------------------------------------------------------


@given(st.lists(STEPS, min_size=1, max_size=8))
def test_text_round_trip_preserves_steps(steps: list[Step]) -> None:
    assert parse_steps(format_steps(tuple(steps))) == tuple(steps)


def test_text_leaves_out_defaults() -> None:
    steps = (ResizeStep(Fit.COVER, 256, 256, Interpolation.BILINEAR), CropStep(224, 224))
    assert format_steps(steps) == "resize cover 256 x 256 bilinear, crop 224 x 224"


@pytest.mark.parametrize(
    "text",
    [
        "RESIZE Cover 256 bilinear,crop 224",
        "resize cover 256x256 bilinear floor , crop  224 × 224 round",
        "resize cover 256 x256 bilinear antialias, crop 224 x 224",
    ],
)
def test_text_may_be_written_in_several_ways(text: str) -> None:
    steps = (ResizeStep(Fit.COVER, 256, 256, Interpolation.BILINEAR), CropStep(224, 224))
    assert parse_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "a step is ''; steps begin with resize, crop, crop aspect, crop fraction, pad, pad aspect, such",
        ),
        ("resize cover 256 bilinear,", "a step is ''"),
        ("warp 3", "a step is 'warp 3'"),
        ("resize 256 bilinear", "resize needs one of cover, contain, stretch, not '256'"),
        ("resize cover bilinear", "resize needs a size, height x width in pixels, such as resize 224 x 224"),
        ("resize cover 256", "resize needs a filter: one of nearest, box, "),
        ("resize cover 256 cubic", "one of nearest, box, bilinear, hamming, bicubic, lanczos, not 'cubic'"),
        ("crop 224 half", "'crop 224 half' has 'half', which crop does not take"),
        ("crop 2801", "crop 2801 x 2801: sides must be from 1 to 2800"),
        ("crop 0", "sides must be from 1"),
        ("crop -5", "crop needs a size"),
        ("crop 9999999", "crop needs a size"),
        ("crop aspect", "crop aspect needs a size"),
        ("crop fraction", "crop fraction needs the fraction of each side, such as crop fraction 0.875"),
        ("crop fraction 224", "crop fraction needs the fraction"),
        ("crop fraction 0.001", "the fraction must be from 0.01 to less than 1"),
        ("crop fraction 0.5 floor", "has 'floor', which crop fraction does not take"),
        ("pad aspect fill 1/2/3", "pad aspect needs a size"),
        ("pad aspect 5 fill 0/0/256", "the fill of a pad aspect is (0, 0, 256)"),
        ("pad 5 fill red", "fill needs red, green and blue from 0 to 255, such as fill 114/114/114"),
        ("pad 5 fill 0/0/256", "three numbers from 0 to 255"),
        ("resize stretch 5 bicubic no-antialias", "bicubic has no form without antialiasing"),
        ("resize stretch 5 bilinear round", "rounds no side"),
        ("crop 5 unrounded", "crop rounds its corner"),
        ("crop 5," * 9, "has 10 steps; at most 8"),
        ("crop 5 " * 500, "has 3500 characters; at most 1000"),
    ],
)
def test_text_that_describes_no_steps_is_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError) as error:
        parse_steps(text)
    assert message in str(error.value)


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resize cover 5 bilinear", "a crop must follow resize cover"),
        ("resize cover 5 bilinear, resize stretch 5 bilinear", "a crop must follow resize cover"),
        ("resize contain 5 bilinear", "the last size depends on the image"),
        ("crop aspect 5", "the last size depends on the image"),
        ("crop fraction 0.5", "the last size depends on the image"),
        ("crop 5, crop fraction 0.5", "the last size depends on the image"),
        ("pad aspect 5", "the last size depends on the image"),
        ("resize contain 5 bilinear, pad aspect 5", "the last size depends on the image"),
        ("pad aspect 5, pad 9", "pad 9 x 9 needs a smaller image"),
        ("crop 5, crop aspect 5 x 4", "the last size depends on the image"),
        ("pad 5", "pad 5 x 5 needs a smaller image"),
        ("resize contain 6 bilinear, pad 5 x 9", "pad 5 x 9 needs a smaller image"),
        ("crop aspect 5 unrounded, crop 5", "a resize stretch with antialiasing must follow"),
        ("crop aspect 5 unrounded, resize stretch 5 bilinear no-antialias", "with antialiasing must follow"),
        ("crop aspect 5 unrounded, resize cover 5 box, crop 5", "a resize stretch with antialiasing must"),
    ],
)
def test_steps_without_a_fixed_size_are_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        find_last_size(parse_steps(text))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("height", 10**9, "sides must be from 1 to 2800"),
        ("height", 0, "sides must be from 1 to 2800"),
        ("width", -1, "sides must be from 1 to 2800"),
        ("width", True, r"steps\[0\]\.width must be int, not bool"),
        ("rounding", "none", "resize rounds a side"),
        ("antialias", "no", "must be bool, not str"),
        ("fit", "fill", "is 'fill'; known are cover, contain, stretch"),
        ("step", "pad", r"steps\[0\] lacks fill"),
    ],
)
def test_hostile_step_is_refused(path: str, value: Any, message: str) -> None:
    document = json.loads(read_contract(build_model()).to_json())
    document["input"]["steps"][0][path] = value
    with pytest.raises(ContractError, match=message):
        Contract.from_json(json.dumps(document))


@pytest.mark.parametrize("fill", [[1, 2], [1, 2, 3, 4], [0, 0, 256], [-1, 0, 0]])
def test_fill_of_other_than_three_bytes_is_refused(fill: list[int]) -> None:
    document = json.loads(read_contract(build_model()).to_json())
    pad = {"step": "pad", "height": 16, "width": 16, "fill": fill, "rounding": "floor"}
    document["input"]["steps"].append(pad)
    with pytest.raises(ContractError, match="three numbers from 0 to 255"):
        Contract.from_json(json.dumps(document))


def test_pickled_geometry_has_no_hash_of_this_process() -> None:
    """The hash of text is another one in another process, so an old hash would find nothing in a set."""
    geometry = Geometry.cropped(16, 24, 30, Interpolation.BICUBIC, PixelPath.FAST)
    assert geometry in {geometry}
    copy = pickle.loads(pickle.dumps(geometry))  # noqa: S301 - our own bytes
    assert (copy, vars(copy).keys()) == (geometry, {"height", "width", "steps", "pixel_path"})


def test_many_steps_are_refused() -> None:
    with pytest.raises(ContractError, match="there are 9 steps; between 1 and 8"):
        Geometry(5, 5, (CropStep(5, 5),) * 9, PixelPath.EXACT)


# --- old contracts -------------------------------------------------------------------------------

OLD: dict[str, Any] = {
    "height": 16, "width": 24, "resize": "shorter", "resize_to": 30,
    "interpolation": "bicubic", "pixel_path": "fast",
}  # fmt: skip
OLD_STRETCH = {**OLD, "resize": "stretch", "resize_to": 0}


@pytest.mark.parametrize(
    ("old", "geometry"),
    [
        (OLD, Geometry.cropped(16, 24, 30, Interpolation.BICUBIC, PixelPath.FAST)),
        (OLD_STRETCH, Geometry.stretched(16, 24, Interpolation.BICUBIC, PixelPath.FAST)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_geometry_of_old_contract_becomes_steps(
    old: dict[str, Any], geometry: Geometry, version: int
) -> None:
    contract = read_contract(build_model())
    document = {**json.loads(contract.to_json()), "format": version, "input": old}
    if version == 1:
        del document["quantization"]
    assert Contract.from_json(json.dumps(document)) == replace(contract, input=geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_to": 8}, "resize_to 8 is smaller than the crop"),
        ({"resize": "stretch"}, "resize_to must be 0"),
        ({"resize": "warp"}, r"contract\.input\.resize is 'warp'"),
        ({"steps": []}, r"contract\.input has unknown steps"),
        ({"height": 0}, "positive"),
        ({"resize_to": 10**6}, "sides must be from 1 to 2800"),
    ],
)
def test_invalid_old_geometry_is_refused(change: dict[str, Any], message: str) -> None:
    document = json.loads(read_contract(build_model()).to_json())
    document |= {"format": 2, "input": {**OLD, **change}}
    with pytest.raises(ContractError, match=message):
        Contract.from_json(json.dumps(document))


@pytest.mark.parametrize("value", [None, [], "square"])
def test_old_contract_without_a_geometry_is_refused(value: Any) -> None:
    document = json.loads(read_contract(build_model()).to_json()) | {"format": 2, "input": value}
    with pytest.raises(ContractError, match=r"contract\.input must be an object"):
        Contract.from_json(json.dumps(document))


def test_geometry_of_checkpoint_is_read_in_both_layouts() -> None:
    geometry = Geometry.cropped(16, 24, 30, Interpolation.BICUBIC, PixelPath.FAST)
    assert read_geometry(OLD, "geometry") == geometry
    assert read_geometry(to_plain_geometry(geometry), "geometry") == geometry
    assert to_plain_geometry(geometry) == json.loads(json.dumps(asdict(geometry)))
