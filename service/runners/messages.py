"""The base class of messages, and the check of what a process has received.

A message is a frozen dataclass. Every request has a number, and its replies repeat the number.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, Self, TypeAlias, Union, get_args, get_origin, get_type_hints

from fovea.service.errors import GoldenError, ModelError, to_one_line
from fovea.service.runners.frames import BytesLike, Frame, FrameError, encode_frame

_PLAIN_TYPES: Final = frozenset({str, int, float, bool, NoneType})

_TypeForm: TypeAlias = Any
"""A class or another type annotation."""


@dataclass(frozen=True)
class Message:
    """A message whose fields are sent as JSON. Further bytes can be sent behind it (`Frame.content`)."""

    def to_pieces(self, contents: Sequence[BytesLike] = ()) -> Iterator[memoryview]:
        """Yield the pieces of the encoded message. See `frames.encode_frame`."""
        return encode_frame(type(self).__name__, self, contents)

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return b"".join(self.to_pieces())

    @classmethod
    def from_frame(cls, frame: Frame) -> Self:
        """Decode a received message. Raises `FrameError` if it is another message or a field is wrong."""
        if frame.kind != cls.__name__:
            raise FrameError(f"sent an unexpected message {frame.kind[:40]!r}")
        message: Self = check_value(cls, frame.values)
        return message


@dataclass(frozen=True)
class NumberedMessage(Message):
    """A request, or a reply to the request with this number."""

    number: int


@dataclass(frozen=True)
class Failure(NumberedMessage):
    """Reply to a request that failed.

    A failed setup, load or trial means that the model cannot be served. A failed batch is a bug in Fovea.
    """

    reason: str
    is_golden_error: bool = False
    """True if the golden set was not reproduced."""
    trace: str = ""
    """Traceback of a bug in Fovea."""

    @classmethod
    def from_model_error(cls, number: int, error: Exception) -> Failure:
        """Return the reply for a model that cannot be served because of `error`."""
        return cls(number, to_one_line(error), isinstance(error, GoldenError))

    @classmethod
    def from_bug(cls, number: int, error: Exception) -> Failure:
        """Return the reply for an unexpected error that is being handled."""
        return cls(number, f"{type(error).__name__}: {to_one_line(error)}", trace=traceback.format_exc())

    def to_exception(self) -> ModelError:
        """Return the failure as an exception."""
        return (GoldenError if self.is_golden_error else ModelError)(self.reason)


def check_value(expected: _TypeForm, value: Any) -> Any:
    """Return a JSON value as an object of the type `expected`.

    Types may be plain, `Any`, literals, unions, sequences, mappings, named tuples and dataclasses. A
    dataclass needs all of its fields and no other, so that at most one dataclass of a union fits. Raises
    `FrameError`.
    """
    if (plain_types := _list_plain_types(expected)) is not None:
        if type(value) in plain_types:
            return value
    elif (origin := _get_origin(expected)) is Union:
        return _check_union(get_args(expected), value)
    elif expected is Any or (origin is Literal and value in get_args(expected)):
        return value
    elif origin is Sequence and isinstance(value, list):
        return _check_items(get_args(expected)[0], value)
    elif origin is Mapping and isinstance(value, dict):
        return dict(zip(value, _check_items(get_args(expected)[1], list(value.values())), strict=True))
    elif (types := _list_field_types(expected)) is not None:
        if isinstance(value, dict) and value.keys() == types.keys():
            return expected(**{name: check_value(types[name], one) for name, one in value.items()})
        if isinstance(value, list) and issubclass(expected, tuple) and len(value) == len(types):
            return expected(*map(check_value, types.values(), value))
    raise FrameError(f"sent a {type(value).__name__} instead of {expected}")


def _check_union(types: Sequence[_TypeForm], value: Any) -> Any:
    for expected in types:
        try:
            return check_value(expected, value)
        except FrameError as error:
            last_error = error
    raise last_error


def _check_items(expected: _TypeForm, values: list[Any]) -> list[Any]:
    """Check all items of a list. Plain items are checked without a call for each: there may be thousands."""
    plain_types = _list_plain_types(expected)
    if plain_types is not None and plain_types >= set(map(type, values)):
        return values
    return [check_value(expected, value) for value in values]


def _get_origin(expected: _TypeForm) -> Any:
    """Return the generic class or special form of a type; `Union` for `|` too."""
    origin: Any = get_origin(expected)
    return Union if origin is UnionType else origin


@cache
def _list_plain_types(expected: _TypeForm) -> frozenset[type] | None:
    """Return the types of the JSON values that a plain type or a union of such types allows; else None."""
    types = set(get_args(expected) if _get_origin(expected) is Union else (expected,))
    if not types <= _PLAIN_TYPES:
        return None
    return frozenset(types | {int} if float in types else types)


@cache
def _list_field_types(expected: _TypeForm) -> Mapping[str, _TypeForm] | None:
    """Return the types of the fields of a dataclass or a named tuple by their names; None for other types."""
    if is_dataclass(expected):
        names = [field.name for field in fields(expected)]
    elif hasattr(expected, "_fields"):
        names = list(expected._fields)
    else:
        return None
    hints = get_type_hints(expected)
    return {name: hints[name] for name in names}
