"""Strict conversion of parsed JSON to dataclasses, without a library: runners start with it.

pydantic would cost 11 MB and 0.13 s in each runner. No value is guessed or converted, except int to float.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final, TypeVar

from fovea.service.errors import ContractError

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise `ContractError` with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)


def from_plain(kind: type[T], value: Any, path: str) -> T:
    """Convert parsed JSON to `kind`, a type of the table `_DECODERS`.

    `path` is the place in the document, for error messages. Raises `ContractError`.
    """
    result: Any = _decode_value(kind, value, path)
    return typing.cast(T, result)


# Each decoder converts parsed JSON to its kind of type. `path` is the place in the document.


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    require(isinstance(value, dict), f"{path} must be an object")
    types_by_name = _field_types(kind)
    names = types_by_name.keys()
    for word, wrong in (("lacks", names - value.keys()), ("has unknown", value.keys() - names)):
        require(not wrong, f"{path} {word} {', '.join(sorted(wrong))}")
    values = {
        name: _decode_value(types_by_name[name], value[name], f"{path}.{name}") for name in types_by_name
    }
    return kind(**values)


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    """Decode the value as the first type that accepts it, or raise the error of the first type."""
    messages = []
    for choice in typing.get_args(kind):
        try:
            return _decode_value(choice, value, path)
        except ContractError as error:
            # Keep no error: with its traceback it would form a cycle that keeps the frames of all callers
            # alive, and with them the bytes of a model file, until the next garbage collection.
            messages.append(str(error))
    raise ContractError(messages[0])


def _decode_list(kind: Any, value: Any, path: str) -> Any:
    require(isinstance(value, list), f"{path} must be a list")
    item_kind = typing.get_args(kind)[0]
    return tuple(_decode_value(item_kind, item, f"{path}[{index}]") for index, item in enumerate(value))


def _decode_mapping(kind: Any, value: Any, path: str) -> Any:
    require(isinstance(value, dict), f"{path} must be an object")
    item_kind = typing.get_args(kind)[1]
    return {key: _decode_value(item_kind, item, f"{path}.{key}") for key, item in value.items()}


def _decode_enum(kind: type[StrEnum], value: Any, path: str) -> Any:
    choices = [member.value for member in kind]
    require(value in choices, f"{path} is {value!r}; known are {', '.join(choices)}")
    return kind(value)


def _decode_null(_kind: Any, value: Any, path: str) -> None:
    require(value is None, f"{path} must be null")


def _decode_float(_kind: Any, value: Any, path: str) -> float:
    if type(value) is int:
        value = float(value)
    require(type(value) is float, f"{path} must be float, not {type(value).__name__}")
    require(math.isfinite(value), f"{path} must be finite")
    return typing.cast(float, value)


def _decode_text(_kind: Any, value: Any, path: str) -> str:
    require(type(value) is str, f"{path} must be str, not {type(value).__name__}")
    value.encode()  # an unpaired surrogate cannot be encoded, so it could not be sent to a client
    return typing.cast(str, value)


def _decode_int(_kind: Any, value: Any, path: str) -> int:
    require(type(value) is int, f"{path} must be int, not {type(value).__name__}")
    return typing.cast(int, value)


_DECODERS: Final[Mapping[Any, Callable[[Any, Any, str], Any]]] = {
    "dataclass": _decode_dataclass,
    "enum": _decode_enum,
    types.UnionType: _decode_union,
    tuple: _decode_list,
    dict: _decode_mapping,
    types.NoneType: _decode_null,
    float: _decode_float,
    str: _decode_text,
    int: _decode_int,
}


@cache
def _decoder_of(kind: Any) -> Callable[[Any, Any, str], Any]:
    if is_dataclass(kind):
        return _DECODERS["dataclass"]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _DECODERS["enum"]
    return _DECODERS[typing.get_origin(kind) or kind]


def _decode_value(kind: Any, value: Any, path: str) -> Any:
    return _decoder_of(kind)(kind, value, path)
