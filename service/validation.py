"""Plain messages for invalid values, because pydantic's messages are written for programmers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_REASON_TEMPLATES: Final = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such name",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "finite_number": "it must be a finite number",
    "int_type": "it takes an integer",
    "int_parsing": "it takes an integer",
    "int_parsing_size": "it takes an integer of fewer digits",
    "int_from_float": "it takes an integer",
    "float_type": "it takes a number",
    "float_parsing": "it takes a number",
    "bool_type": "it takes true or false",
    "bool_parsing": "it takes true or false",
    "string_type": "it takes text",
    "string_too_short": "it takes at least {min_length} characters",
    "string_too_long": "it takes at most {max_length} characters",
    "literal_error": "it takes {expected}",
    "enum": "it takes {expected}",
    "too_short": "it takes at least {min_length}",
    "too_long": "it takes at most {max_length}",
    "tuple_type": "it takes a list",
    "list_type": "it takes a list",
    "dict_type": "it takes an object",
    "model_type": "it takes an object",
    "model_attributes_type": "it takes an object",
}
"""Messages by pydantic's error type; the placeholders come from the error's context."""


def describe_error(error: Mapping[str, Any]) -> str:
    """Describe one of `ValidationError.errors()`, without the name of the value."""
    reason = _REASON_TEMPLATES.get(str(error["type"]))
    if reason is not None:
        return reason.format_map(error.get("ctx", {}))
    message = str(error["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "it must be", 1)
