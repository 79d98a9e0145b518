"""Images as Python values: paths, bytes, PIL images and NumPy arrays become encoded images.

Pixels in memory become a TIFF without compression, which takes 3 ms for two megapixels and loses nothing. So
one decoder, the service's, handles every image: colours, orientation, transparency and limits follow the same
rules for a file, a PIL image and an array.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fovea.service.errors import (
    BadImage,
    BadRequest,
    FileError,
    RequestError,
    TooManyPixels,
    to_one_line,
)
from fovea.service.image_files import check_image_size, read_image_file
from fovea.service.inference.boxes import Boxes, check_boxes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

BoxList: TypeAlias = "Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]"
"""Boxes in one image: left, top, right and bottom of each, as integers. Right and bottom are exclusive."""

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.generic]"
)
"""An image: a path, an encoded image as bytes, a PIL image, or an array of pixels.

Arrays have the shape (height, width, 3) for sRGB colours in the order red, green, blue, (height, width, 4)
for the same with opacity, or (height, width) or (height, width, 1) for grey. They are uint8, or uint16 for
grey.
"""

ImageError: TypeAlias = RequestError | FileError
"""The error of one image."""

_MODE_REPLACEMENTS: Final = {
    "HSV": "RGB",
    "YCbCr": "RGB",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "La": "LA",
    "PA": "RGBA",
}
"""Modes of PIL images that a TIFF cannot hold, or holds in another way, and the mode that they become."""

_ORIENTATION: Final = 0x0112
"""EXIF and TIFF tag of the orientation."""

_LOADING_LOCKS: Final = [threading.Lock() for _ in range(64)]
"""Locks of PIL images, by their ids. An image that was opened and not read has one position in its file."""


def _renew_locks() -> None:
    """Replace the locks in a forked child: a thread of the parent may have held one."""
    _LOADING_LOCKS[:] = [threading.Lock() for _ in _LOADING_LOCKS]


os.register_at_fork(after_in_child=_renew_locks)


def list_images(images: Any) -> tuple[list[Any], bool]:
    """Return a list of images, and whether `images` is a single image.

    Raises `TypeError` that names the first value that is no image. No image is read.
    """
    if _is_image(images):
        return [images], True
    # Files and dictionaries can be iterated too, but their lines and keys are no images.
    if not isinstance(images, Iterable) or isinstance(images, Mapping) or hasattr(images, "read"):
        raise TypeError(_describe_type(images))
    sources = list(images)
    for index, source in enumerate(sources):
        if not _is_image(source):
            raise TypeError(f"images[{index}]: {_describe_type(source)}")
    return sources, False


def _is_image(value: Any) -> bool:
    return (
        isinstance(value, str | os.PathLike | bytes | bytearray | memoryview)
        or _is_instance(value, "numpy", "ndarray")
        or _is_instance(value, "PIL.Image", "Image")
    )


def _is_instance(value: Any, module: str, name: str) -> bool:
    """Return whether `value` is of a class, without importing its module: such a value needs the module."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _describe_type(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    advice = ""
    if hasattr(value, "read"):
        advice = "; pass the bytes that its `read()` returns"
    elif hasattr(value, "numpy"):
        advice = "; pass a uint8 array (height, width, 3)"
    return (
        f"{name} is not an image; pass a path, bytes, a PIL image or a uint8 array, or a list of them{advice}"
    )


def list_boxes(boxes: Any, image_count: int | None) -> list[Boxes]:
    """Return the boxes of each image. `boxes` are those of one image if `image_count` is None.

    Raises `BadRequest` that names the first wrong box.
    """
    try:
        if image_count is None:
            return [check_boxes(boxes)]
        if isinstance(boxes, str | bytes) or not isinstance(boxes, Iterable):
            raise ValueError("for a list of images it must be a list with the boxes of each image")
        box_lists = list(boxes)
        if len(box_lists) != image_count:
            raise ValueError(f"there are the boxes of {len(box_lists)} images, but {image_count} images")
    except ValueError as error:
        raise BadRequest(f"boxes: {error}") from None
    results = []
    for index, one in enumerate(box_lists):
        try:
            results.append(check_boxes(one))
        except ValueError as error:
            raise BadRequest(f"boxes[{index}]: {error}") from None
    return results


def check_on_error(on_error: str) -> None:
    """Raise `ValueError` for an unknown value of the parameter `on_error`."""
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'return'")


def name_error(error: ImageError, source: Any, index: int | None) -> ImageError:
    """Return the error with a message that names the image: by its position in a list, and its path."""
    name = printable_name(source) if isinstance(source, str | os.PathLike) else ""
    if index is not None:
        name = f"images[{index}] ({name})" if name else f"images[{index}]"
    if not name:
        return error
    named_error = copy.copy(error)
    named_error.args = (f"{name}: {error}",)
    named_error.__cause__ = error.__cause__
    return named_error


def printable_name(path: str | os.PathLike[str]) -> str:
    """Return a path as printable text; a file name need not be valid UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def encode_source(source: Any, *, max_bytes: int, max_pixels: int | None = None) -> bytes:
    """Return the encoded image of an `ImageSource`.

    Files and bytes are returned as they are, and have at most `max_bytes` bytes. PIL images and arrays have
    at most `max_pixels` pixels.

    Raises `FileError`, `BodyTooLarge`, `TooManyPixels`, and `BadImage` for pixels without a conversion rule.
    """
    if isinstance(source, str | os.PathLike):
        if str(source).startswith(("http://", "https://")):
            raise FileError("an address is not read; download the image, and pass its bytes")
        return read_image_file(Path(source), max_bytes)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        check_image_size(len(content), max_bytes, "the image")
        return content
    if _is_instance(source, "numpy", "ndarray"):
        return _encode_array(source, max_pixels)
    return _encode_image(source, max_pixels)


def _check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(f"image is {width} x {height} px; at most {max_pixels / 1e6:g} MP")


def _encode_array(array: npt.NDArray[Any], max_pixels: int | None) -> bytes:
    shape, kind = array.shape, str(array.dtype)
    channels = shape[2] if len(shape) == 3 else 1
    is_grey = len(shape) == 2 or channels == 1
    if len(shape) not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise BadImage(_describe_shape(shape))
    if kind != "uint8" and not (kind == "uint16" and is_grey):
        raise BadImage(_describe_dtype(kind))
    height, width = shape[:2]
    _check_pixels(width, height, max_pixels)
    from PIL import Image

    return _to_tiff(Image.fromarray(array[..., 0] if is_grey and len(shape) == 3 else array))


def _describe_shape(shape: Sequence[int]) -> str:
    text = f"an array of shape {tuple(shape)} is not an image; pass (height, width, 3) or (height, width)"
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        return f"{text}: the channels come last, `array.transpose(1, 2, 0)` puts them there"
    return f"{text}, and several images as a list" if len(shape) == 4 else text


def _describe_dtype(kind: str) -> str:
    if kind == "uint16":
        return "a uint16 array of colours is not served; pass uint8, such as `(array // 257).astype('uint8')`"
    return f"an array of type {kind} is not served, because its range is unknown; pass uint8, from 0 to 255"


def _encode_image(image: Image.Image, max_pixels: int | None) -> bytes:
    """Encode a PIL image with its ICC profile and its EXIF orientation, which the decoder then applies."""
    _check_pixels(image.width, image.height, max_pixels)
    if 0 in image.size:
        raise BadImage(f"an image of {image.width} x {image.height} px has no pixels")
    try:
        with _LOADING_LOCKS[id(image) // 16 % len(_LOADING_LOCKS)]:
            image.load()
            orientation = image.getexif().get(_ORIENTATION)
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise BadImage(f"the PIL image cannot be decoded: {to_one_line(error)}") from error
    mode = _MODE_REPLACEMENTS.get(image.mode, image.mode)
    if image.has_transparency_data and mode not in ("RGBA", "LA") and not mode.startswith("I;16"):
        mode = "RGBA"
    return _to_tiff(image if mode == image.mode else image.convert(mode), orientation)


def _to_tiff(image: Image.Image, orientation: Any = None) -> bytes:
    buffer = BytesIO()
    tags = {_ORIENTATION: orientation} if isinstance(orientation, int) and 1 < orientation <= 8 else {}
    try:
        image.save(buffer, "TIFF", compression=None, tiffinfo=tags)
    except (OSError, ValueError, TypeError) as error:
        raise BadImage(f"the image cannot be encoded: {to_one_line(error)}") from error
    return buffer.getvalue()
