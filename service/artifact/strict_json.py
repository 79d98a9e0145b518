"""Strict conversion of parsed JSON to dataclasses, without a library: runners start with it.

pydantic would cost 11 MB and 0.13 s in each runner. No value is guessed or converted, except int to float.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
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
    _require_names(value, path)
    types_by_name = _field_types(kind)
    names = types_by_name.keys()
    for word, wrong in (("lacks", names - value.keys()), ("has unknown", value.keys() - names)):
        require(not wrong, f"{path} {word} {', '.join(sorted(wrong))}")
    values = {
        name: _decode_value(types_by_name[name], value[name], f"{path}.{name}") for name in types_by_name
    }
    # A field that is no parameter has one value, its default, which its decoder has checked.
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.init})


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _find_tag(kind: Any) -> tuple[str, Mapping[Any, Any]] | None:
    """Return the tag of a union of dataclasses, or None.

    The tag is the first field, and a `Literal` in all of them. It comes with the dataclasses by its values.
    """
    kinds: dict[tuple[str, Any], Any] = {}
    for choice in typing.get_args(kind):
        if not is_dataclass(choice):
            return None
        field_types: dict[str, Any] = _field_types(typing.cast(Any, choice))
        name, field_kind = next(iter(field_types.items()))
        if typing.get_origin(field_kind) is not typing.Literal:
            return None
        kinds |= {(name, value): choice for value in typing.get_args(field_kind)}
    (name, *others) = {name for name, _ in kinds}
    return None if others else (name, {value: choice for (_, value), choice in kinds.items()})


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    """Decode the value as the first type that accepts it, or raise the error of the first type.

    The value of a tag, if the types have one, chooses the type.
    """
    if tag := _find_tag(kind):
        name, kinds = tag
        require(isinstance(value, dict), f"{path} must be an object")
        require(name in value, f"{path} lacks {name}, one of {', '.join(kinds)}")
        return _decode_value(kinds[_decode_choice(tuple(kinds), value[name], f"{path}.{name}")], value, path)
    messages = []
    for choice in typing.get_args(kind):
        try:
            return _decode_value(choice, value, path)
        except ContractError as error:
            # Keep no error: with its traceback it would form a cycle that keeps the frames of all callers
            # alive, and with them the bytes of a model file, until the next garbage collection.
            messages.append(str(error))
    raise ContractError(messages[0])


def _require_names(value: Any, path: str) -> None:
    """Require an object whose names can stand in an error message."""
    require(isinstance(value, dict), f"{path} must be an object")
    for name in value:
        _require_encodable(name)


def _require_encodable(text: str) -> None:
    """Raise `UnicodeEncodeError` for an unpaired surrogate, which could not be sent to a client."""
    text.encode()


def _decode_list(kind: Any, value: Any, path: str) -> Any:
    require(isinstance(value, list), f"{path} must be a list")
    item_kind = typing.get_args(kind)[0]
    return tuple(_decode_value(item_kind, item, f"{path}[{index}]") for index, item in enumerate(value))


def _decode_mapping(kind: Any, value: Any, path: str) -> Any:
    _require_names(value, path)
    item_kind = typing.get_args(kind)[1]
    return {key: _decode_value(item_kind, item, f"{path}.{key}") for key, item in value.items()}


def _decode_enum(kind: type[StrEnum], value: Any, path: str) -> Any:
    return kind(_decode_choice([member.value for member in kind], value, path))


def _decode_literal(kind: Any, value: Any, path: str) -> Any:
    return _decode_choice(typing.get_args(kind), value, path)


def _decode_choice(choices: Sequence[str], value: Any, path: str) -> str:
    require(value in choices, f"{path} is {value!r}; known are {', '.join(choices)}")
    return typing.cast(str, value)


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
    _require_encodable(value)
    return typing.cast(str, value)


def _decode_bool(_kind: Any, value: Any, path: str) -> bool:
    require(type(value) is bool, f"{path} must be bool, not {type(value).__name__}")
    return typing.cast(bool, value)


def _decode_int(_kind: Any, value: Any, path: str) -> int:
    require(type(value) is int, f"{path} must be int, not {type(value).__name__}")
    return typing.cast(int, value)


_DECODERS: Final[Mapping[Any, Callable[[Any, Any, str], Any]]] = {
    "dataclass": _decode_dataclass,
    "enum": _decode_enum,
    typing.Literal: _decode_literal,
    types.UnionType: _decode_union,
    tuple: _decode_list,
    dict: _decode_mapping,
    types.NoneType: _decode_null,
    bool: _decode_bool,
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
