"""The options `--box` and `--boxes`, as boxes."""

from __future__ import annotations

from collections.abc import Sequence

from fovea.service.errors import StartError
from fovea.service.inference.boxes import Boxes, check_boxes, parse_boxes


def read_boxes(box_texts: Sequence[str] | None, json_text: str | None) -> Boxes | None:
    """Return the boxes of both options, those of `--box` first; None without the options.

    Raises `StartError`.
    """
    if not box_texts and json_text is None:
        return None
    try:
        boxes = [[int(part) for part in text.split(",")] for text in box_texts or ()]
    except ValueError:
        raise StartError(f"--box is {', '.join(box_texts or ())}; it takes four integers, {_FORM}") from None
    try:
        return check_boxes([*check_boxes(boxes), *(parse_boxes(json_text) if json_text is not None else ())])
    except ValueError as error:
        raise StartError(f"boxes: {error}") from None


_FORM = "left,top,right,bottom, such as --box 0,0,100,100"
