"""The answer for one image, the same from a model in this process and from a service."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

_BAR_PIXELS: Final = 160
"""Width of the bar of probability 1 in a notebook, in pixels."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label with its probability, from 0 to 1."""

    label: str
    index: int
    """Position of the label in the model's list of labels."""
    probability: float
    selected: bool | None = None
    """True if the label passes the model's threshold; None for multi-class models, which have none."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A set of labels, most probable first, that contains the true label in a share `level` of all cases."""

    level: float
    labels: tuple[str, ...]
    abstain: bool
    """True if the set is empty, or too large to be useful."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The format of an image, and its size in pixels after the EXIF orientation was applied."""

    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageWarning:
    """A warning about an image: a stable code for programs, and a message for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ModelName:
    """The name and the version of the model that answered."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The answer for one image."""

    model: ModelName
    predictions: tuple[Prediction, ...]
    """The most probable labels, best first: at most `top_k` of them."""
    image: ImageInfo
    warnings: tuple[ImageWarning, ...]
    """Warnings about how the pixels were made from the image."""
    coverage: LabelSet | None
    """Label set; None unless `coverage` was requested."""
    known: bool | None
    """Whether the image is like those that the model was trained on; None if the model does not tell."""
    known_score: float | None
    """Score on which `known` rests; higher is more alike."""
    top_k: int = field(compare=False)
    """Largest number of labels that was requested; 0 for all."""
    embedding: tuple[float, ...] | None = None
    """The vector that the model's last layer reads; None unless `embedding` was requested."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the classified region, in pixels of the upright image.

    None if the whole image was classified. `image` is about the whole image in any case.
    """

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any], top_k: int) -> Result:
        """Create the result from the native JSON reply to one image, for which `top_k` labels were requested.

        Raises `KeyError`, `TypeError` or `ValueError` if the reply is not of this form. Unknown fields are
        ignored.
        """
        label_set = reply.get("coverage")
        return cls(
            model=ModelName(reply["model"]["name"], reply["model"]["version"]),
            predictions=tuple(
                Prediction(one["label"], one["index"], one["probability"], one.get("selected"))
                for one in reply["predictions"]
            ),
            image=ImageInfo(reply["image"]["format"], reply["image"]["width"], reply["image"]["height"]),
            warnings=tuple(ImageWarning(one["code"], one["message"]) for one in reply.get("warnings", ())),
            coverage=label_set
            and LabelSet(label_set["level"], tuple(label_set["labels"]), label_set["abstain"]),
            known=reply.get("known"),
            known_score=reply.get("known_score"),
            top_k=top_k,
            embedding=_decode_floats(reply["embedding"]) if "embedding" in reply else None,
            box=_read_box(reply["box"]) if "box" in reply else None,
        )

    @classmethod
    def list_from_reply(cls, reply: Mapping[str, Any], top_k: int) -> list[Result]:
        """Create the results of the boxes from the native JSON reply to one image.

        The warnings about the image come before those about the box. Raises errors like `from_reply`.
        """
        shared_fields = {"model": reply["model"], "image": reply["image"]}
        image_warnings = reply.get("warnings", [])
        return [
            cls.from_reply(
                one | shared_fields | {"warnings": image_warnings + one.get("warnings", [])}, top_k
            )
            for one in reply["boxes"]
        ]

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.predictions[0].label

    @property
    def probability(self) -> float:
        """Probability of the most probable label, from 0 to 1."""
        return self.predictions[0].probability

    @property
    def selected_labels(self) -> tuple[str, ...]:
        """Labels that pass the model's thresholds, most probable first.

        Raises `ValueError` for a multi-class model, which has no thresholds, and if labels are missing here
        because of `top_k`.
        """
        if self.predictions[0].selected is None:
            raise ValueError(f"{self.model.name} is a multi-class model, which has no thresholds")
        self._require_labels(None)
        return tuple(one.label for one in self.predictions if one.selected)

    def top(self, count: int = 5) -> tuple[Prediction, ...]:
        """Return the `count` most probable labels, best first; all labels if the model has no more.

        Raises `ValueError` if labels are missing here because of `top_k`.
        """
        if count < 0:
            raise ValueError(f"top({count}): the number of labels must be at least 0")
        self._require_labels(count)
        return self.predictions[:count]

    def _require_labels(self, count: int | None) -> None:
        """Raise `ValueError` unless the result holds `count` labels, or all of them for None."""
        if not self.top_k or len(self.predictions) < self.top_k:  # all labels are here
            return
        if count is None or count > len(self.predictions):
            needed = "all labels are needed" if count is None else f"{count} labels are needed"
            raise ValueError(
                f"{needed}, but the result holds {len(self.predictions)}; classify with top_k={count or 0}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with the keys of the service's JSON reply to one image."""
        fields: dict[str, Any] = {
            "model": {"name": self.model.name, "version": self.model.version},
            **({} if self.box is None else {"box": list(self.box)}),
            "predictions": [
                {"label": one.label, "index": one.index, "probability": one.probability}
                | ({} if one.selected is None else {"selected": one.selected})
                for one in self.predictions
            ],
        }
        if self.coverage:
            fields["coverage"] = {
                "level": self.coverage.level,
                "labels": list(self.coverage.labels),
                "abstain": self.coverage.abstain,
            }
        if self.embedding is not None:
            content = struct.pack(f"<{len(self.embedding)}f", *self.embedding)
            fields["embedding"] = base64.b64encode(content).decode()
        if self.known is not None:
            fields |= {"known": self.known, "known_score": self.known_score}
        image = self.image
        fields["image"] = {"format": image.format, "width": image.width, "height": image.height}
        if self.warnings:
            fields["warnings"] = [{"code": one.code, "message": one.message} for one in self.warnings]
        return fields

    def __repr__(self) -> str:
        """Return the best label in one line."""
        codes = f", warnings: {', '.join(one.code for one in self.warnings)}" if self.warnings else ""
        unknown = ", unlike the training images" if self.known is False else ""
        name = f"{self.model.name} {self.model.version}"
        place = f" in {self.box}" if self.box else ""
        return f"<Result {self.label!r} {self.probability:.4f}{place} by {name}{unknown}{codes}>"

    def _repr_html_(self) -> str:
        """Return a table of the labels with bars, which notebooks show."""
        rows = "".join(
            f"<tr><td>{escape(one.label)}</td><td>{one.probability:.1%}</td>"
            f'<td style="text-align: left"><div style="background: #2a9d5c; height: 0.8em; '
            f'width: {_BAR_PIXELS * one.probability:.0f}px"></div></td></tr>'
            for one in self.predictions
        )
        lines = [f"{escape(one.code)}: {escape(one.message)}" for one in self.warnings]
        if self.known is False:
            lines.append("unlike the images that the model was trained on")
        if self.coverage:
            labels = escape(", ".join(self.coverage.labels)) or "none"
            doubt = " (too uncertain to decide)" if self.coverage.abstain else ""
            share = f"{100 * self.coverage.level:g}%"
            lines.append(
                f"for images like the test images, the true label is among these in {share} of cases: "
                f"{labels}{doubt}"
            )
        caption = escape(f"{self.model.name} version {self.model.version}")
        if self.box:
            caption += f", box {self.box}"
        notes = "".join(f"<div>{line}</div>" for line in lines)
        return f"<table><caption>{caption}</caption>{rows}</table>{notes}"


def _read_box(values: list[int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = values
    return left, top, right, bottom


def _decode_floats(text: str) -> tuple[float, ...]:
    """Return the values of little-endian float32 as base64. Raises `ValueError`."""
    content = base64.b64decode(text, validate=True)
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes are no float32 values")
    return struct.unpack(f"<{len(content) // 4}f", content)
