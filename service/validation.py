"""Plain messages for invalid values, because pydantic's messages are written for programmers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_REASON_TEMPLATES: Final = {
    "missing": "it is missing",
    "extra_forbidden": "unknown name",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "finite_number": "it must be a finite number",
    "int_type": "it must be an integer",
    "int_parsing": "it must be an integer",
    "int_parsing_size": "it must be an integer with fewer digits",
    "int_from_float": "it must be an integer",
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "string_type": "it must be a string",
    "string_too_short": "it must have {min_length} or more characters",
    "string_too_long": "it must have at most {max_length} characters",
    "literal_error": "it must be {expected}",
    "enum": "it must be {expected}",
    "too_short": "it must have {min_length} or more entries",
    "too_long": "it must have at most {max_length} entries",
    "tuple_type": "it must be a list",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
}
"""Messages by pydantic's error type; the placeholders come from the error's context."""


def describe_error(error: Mapping[str, Any]) -> str:
    """Describe one of `ValidationError.errors()`, without the name of the value."""
    reason = _REASON_TEMPLATES.get(str(error["type"]))
    if reason is not None:
        return reason.format_map(error.get("ctx", {}))
    message = str(error["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "it must be", 1)
