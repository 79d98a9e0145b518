"""The trace of a decoding: the steps that changed an image, described for people."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import ImageFile

from fovea.service.artifact.contract import Geometry
from fovea.service.inference.colour import Conversion
from fovea.service.inference.pixels import Box
from fovea.service.inference.resize import compute_crop_corner, compute_target_size, format_size
from fovea.service.inference.rotation import ROTATIONS, Rotation


@dataclass
class DecodeTrace:
    """A record of the steps that `decode_image` applied to one image, for people."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    """Names and descriptions, in order, of the steps that changed something."""
    crop_box: Box = (0, 0, 0, 0)
    """Region of the upright image that the pixels cover, in pixels of that image."""

    def add_step(self, name: str, description: str) -> None:
        """Append a step."""
        self.steps.append((name, description))


def trace_decoding(
    trace: DecodeTrace, kind: str, size: tuple[int, int], image_file: ImageFile.ImageFile
) -> None:
    """Record the decoding. `image_file` is drafted, so its size may be below the full `size`."""
    trace.add_step("decode", f"{kind} of {format_size(size)} pixels")
    if image_file.size != size:
        trace.add_step(
            "scale",
            f"decoded at {format_size(image_file.size)}: the JPEG decoder leaves out detail",
        )


def trace_conversion(
    trace: DecodeTrace,
    image_file: ImageFile.ImageFile,
    rotation: Rotation | None,
    conversion: Conversion | None,
) -> None:
    """Record rotation and colour conversion."""
    if rotation:
        orientation = next(number for number, other in ROTATIONS.items() if other is rotation)
        trace.add_step("orient", f"rotated upright, by EXIF orientation {orientation}")
    if conversion:
        trace.add_step("colours", f"from {conversion.name} to sRGB, by the image's profile")
    if image_file.has_transparency_data:
        trace.add_step("convert", f"from {image_file.mode} to RGB, transparent areas on white")
    elif image_file.mode != "RGB":
        trace.add_step("convert", f"from {image_file.mode} to RGB")


def trace_resize(trace: DecodeTrace, size: tuple[int, int], geometry: Geometry) -> None:
    """Record resize and crop of an upright image of full `size`.

    The region outside the crop may not have been resized, which the trace does not show.
    """
    target_size = compute_target_size(size, geometry)
    left, top = compute_crop_corner(target_size, geometry)
    crop_size = geometry.width, geometry.height
    if target_size != size:
        trace.add_step(
            "resize", f"from {format_size(size)} to {format_size(target_size)}, {geometry.interpolation}"
        )
    if target_size != crop_size:
        trace.add_step(
            "crop", f"the middle {format_size(crop_size)}, {left} from the left and {top} from the top"
        )
    scale_x, scale_y = size[0] / target_size[0], size[1] / target_size[1]
    trace.crop_box = (
        left * scale_x,
        top * scale_y,
        (left + crop_size[0]) * scale_x,
        (top + crop_size[1]) * scale_y,
    )
