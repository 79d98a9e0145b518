"""Descriptors of Protocol Buffers as plain values, so that two processes can compare them."""

from __future__ import annotations

from typing import Any


def describe_file(file: Any) -> dict[str, Any]:
    """Return the messages, enumerations and methods of a file by full name."""
    messages = file.message_types_by_name.values()
    enums = [
        *file.enum_types_by_name.values(),
        *(enum for message in messages for enum in message.enum_types),
    ]
    return {
        "messages": {name: fields for message in messages for name, fields in _describe_message(message)},
        "enums": {enum.full_name: {value.name: value.number for value in enum.values} for enum in enums},
        "methods": {
            method.full_name: [
                method.input_type.full_name,
                method.output_type.full_name,
                method.client_streaming,
                method.server_streaming,
            ]
            for service in file.services_by_name.values()
            for method in service.methods
        },
    }


def _describe_message(message: Any) -> list[tuple[str, Any]]:
    """Return the fields of a message and of the messages in it, by the full name of the message."""
    fields = {
        field.name: {
            "number": field.number,
            "type": field.type,
            "label": [field.is_repeated, field.is_required, field.has_presence, field.is_packed],
            "of": (field.message_type or field.enum_type).full_name
            if field.message_type or field.enum_type
            else "",
            "oneof": field.containing_oneof.name if field.containing_oneof else "",
            "json": field.json_name,
        }
        for field in message.fields
    }
    nested = [one for child in message.nested_types for one in _describe_message(child)]
    return [(message.full_name, {"is_map": message.GetOptions().map_entry, "fields": fields}), *nested]
