"""Values of settings: parsers of lists and paths, and descriptions of what a setting accepts."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

_VALID_HOST: Final = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


_VALID_ORIGIN: Final = re.compile(
    r"https?://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)

_VALID_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_VERSION_PATTERNS: Final = ("[0-9]*/model.onnx", "[!.]*/[0-9]*/model.onnx")
"""Model files of a repository, which take precedence over one beside their folders."""

_VALID_ROUTE: Final = re.compile(r"/[A-Za-z0-9._~:@!$&'()*+,;=/-]{0,255}")


def parse_hosts(value: Any) -> Any:
    """Split a comma-separated list of host names.

    Raises `ValueError` for a malformed host name.
    """
    if not isinstance(value, str):
        return value
    hosts = tuple(filter(None, (one.strip().lower().removesuffix(".") for one in value.split(","))))
    for one in hosts:
        if not _VALID_HOST.fullmatch(one):
            raise ValueError(
                f"{one!r} is not a host name; give it without scheme and port, such as photos.example.com"
            )
    return hosts


def parse_origins(value: Any) -> Any:
    """Split a comma-separated list of origins; `*` stands for every origin.

    Raises `ValueError` for a malformed origin.
    """
    if not isinstance(value, str):
        return value
    origins = tuple(filter(None, (one.strip().lower() for one in value.split(","))))
    for one in origins:
        if one != "*" and not _VALID_ORIGIN.fullmatch(one):
            raise ValueError(
                f"{one!r} is not an origin; give scheme, host and port without a path, such as "
                "https://app.example.com, or * for every origin"
            )
    return origins


def parse_networks(value: Any) -> Any:
    """Split a comma-separated list of addresses and networks.

    Raises `ValueError` for anything else.
    """
    if not isinstance(value, str):
        return value
    networks = tuple(filter(None, (one.strip() for one in value.split(","))))
    for one in networks:
        try:
            ip_network(one)
        except ValueError as error:
            raise ValueError(f"{error}; give addresses or networks, such as 10.0.0.0/8,::1") from None
    return networks


def check_path(path: Path) -> Path:
    """Return the path if it exists, or the model file if that is all there is in the folder.

    Raises `ValueError` with the reason of the system.
    """
    try:
        path.stat()
    except OSError as error:
        raise ValueError(f"{error.strerror}; give a model repository (--models) or one model file") from None
    file = path / "model.onnx"  # as platforms mount a single model
    if not file.is_file() or any(next(path.glob(one), None) for one in _VERSION_PATTERNS):
        return path
    return file


def check_model_name(name: str | None) -> str | None:
    """Return the name of a model if it can be one.

    Raises `ValueError`.
    """
    if name is not None and not _VALID_MODEL_NAME.fullmatch(name):
        raise ValueError("use letters, digits and . _ - with a letter or digit first, such as resnet-50")
    return name


def check_route(route: str | None) -> str | None:
    """Return the path of a route if it is one.

    Raises `ValueError`.
    """
    if route is not None and not _VALID_ROUTE.fullmatch(route):
        raise ValueError("it must be a path without parameters, such as /predict")
    return route


def describe_values(field: FieldInfo) -> str:
    """Return words for the values that a setting accepts, to follow "it must be"."""
    value_type: Any = field.annotation
    if type(None) in get_args(value_type):  # `int | None`: None is the default and cannot be written
        (value_type,) = (one for one in get_args(value_type) if one is not type(None))
    choices = [repr(choice) for choice in get_args(value_type)] if get_origin(value_type) is Literal else []
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    word = {bool: "true or false", int: "an integer", float: "a number"}.get(value_type, "")
    if not word:
        return f"a valid value. {field.description}"
    lowest, above, highest, below = (
        next((value for one in field.metadata if (value := getattr(one, name, None)) is not None), None)
        for name in ("ge", "gt", "le", "lt")
    )
    if lowest is not None and highest is not None:
        return f"{word} from {lowest} to {highest}"
    limits = {"of at least": lowest, "above": above, "of at most": highest, "below": below}
    return " ".join(
        [word, " and ".join(f"{how} {limit}" for how, limit in limits.items() if limit is not None)]
    ).strip()
