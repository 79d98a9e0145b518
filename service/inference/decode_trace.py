"""The trace of a decoding: the steps that changed an image, described for people."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import ImageFile

from fovea.service.artifact.geometry import AspectPadStep, Geometry, PadStep, ResizeStep
from fovea.service.inference.colour import Conversion
from fovea.service.inference.geometry_plan import PlannedStep, Size, find_visible_box, plan_steps
from fovea.service.inference.geometry_warnings import format_size
from fovea.service.inference.pixels import Box
from fovea.service.inference.rotation import ROTATIONS, Rotation


@dataclass
class DecodeTrace:
    """A record of the steps that `decode_image` applied to one image, for people."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    """Names and descriptions, in order, of the steps that changed something."""
    crop_box: Box = (0, 0, 0, 0)
    """Region of the upright image that the pixels cover, in pixels of that image.

    The region is larger than the image where the input has a border.
    """

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
            f"to {format_size(image_file.size)} by the JPEG decoder, which leaves out detail",
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


def trace_geometry(trace: DecodeTrace, size: Size, decoded_size: Size, geometry: Geometry) -> None:
    """Record the steps of the geometry for an upright image of full `size`, decoded at `decoded_size`.

    The steps up to the resize are in pixels of the decoded image. The region outside the crop may not have
    been resized, which the trace does not show.
    """
    plan = plan_steps(size, geometry)
    scale = decoded_size[0] / size[0], decoded_size[1] / size[1]
    for planned_step in plan:
        before = planned_step.size
        if planned_step.target_size != before or planned_step.box != (0, 0, *before):
            trace.add_step(*_describe_step(_scale_step(planned_step, scale)))
        if isinstance(planned_step.step, ResizeStep):
            scale = 1.0, 1.0
    trace.crop_box = find_visible_box(plan)


def _scale_step(planned_step: PlannedStep, scale: tuple[float, float]) -> PlannedStep:
    """Return the step for an image of which the JPEG decoder has kept only a share of width and height."""
    step, size, box, target_size = planned_step
    if scale == (1.0, 1.0):
        return planned_step
    left, top, right, bottom = box
    across, down = scale
    return PlannedStep(
        step,
        _scale_size(size, scale),
        (left * across, top * down, right * across, bottom * down),
        target_size if isinstance(step, ResizeStep) else _scale_size(target_size, scale),
    )


def _scale_size(size: Size, scale: tuple[float, float]) -> Size:
    return round(size[0] * scale[0]), round(size[1] * scale[1])


def _describe_step(planned_step: PlannedStep) -> tuple[str, str]:
    """Return the name and a description of a step that changes the image."""
    step, size, box, target_size = planned_step
    if isinstance(step, ResizeStep):
        filter_ = step.interpolation if step.antialias else f"{step.interpolation} without antialiasing"
        return "resize", f"from {format_size(size)} to {format_size(target_size)}, {filter_}"
    pad = step if isinstance(step, PadStep | AspectPadStep) else None
    if pad or min(box[:2]) < 0:
        fill = pad.fill if pad else (0, 0, 0)
        colour = "black" if not any(fill) else f"the colour {'/'.join(map(str, fill))}"
        name = "pad" if pad else "crop"
        border = f"{max(0, int(-box[0]))} on the left and {max(0, int(-box[1]))} at the top"
        return name, f"to {format_size(target_size)} with a border of {colour}, {border}"
    # An aspect crop without rounding may have fractions.
    left, top, width, height = (
        f"{one:.2f}".removesuffix(".00") for one in (*box[:2], box[2] - box[0], box[3] - box[1])
    )
    return "crop", f"the middle {width} x {height}, {left} from the left and {top} from the top"
