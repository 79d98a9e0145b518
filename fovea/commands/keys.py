"""`fovea keys`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fovea.service.access.keys_file import ApiKey


def keys(
    action: Annotated[
        Literal["add", "list", "remove"], typer.Argument(help="What to do with the keys file.")
    ],
    name: Annotated[str | None, typer.Argument(help="Name of the key, such as phone-app.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What a new key may do: classify, explain, manage or metrics; may be repeated. Default: "
            "classify."
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Last day of a new key in UTC, such as 2027-06-30; default: never.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Keys file [FOVEA_KEYS].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """Add, list or remove API keys of a service. A running service accepts the change by itself."""
    from fovea.service.access.caller import Scope
    from fovea.service.access.key_editor import add_key, list_keys, remove_key
    from fovea.service.access.keys_file import parse_last_day, parse_scopes
    from fovea.service.errors import StartError
    from fovea.service.settings import load_settings

    path = file or load_settings().keys
    if path is None:
        raise StartError("there is no keys file; set FOVEA_KEYS, or name the file with --file")
    if (name is None) != (action == "list"):
        raise StartError(
            "`fovea keys list` takes no name" if name else f"`fovea keys {action}` needs the name of a key"
        )
    for option, value in {"--scope": scope, "--expires": expires}.items():
        if value and action != "add":
            raise StartError(f"{option} is for `fovea keys add`")
    if as_json and action != "list":
        raise StartError("--json is for `fovea keys list`")
    if name is None:
        _print_keys(list_keys(path), as_json=as_json)
    elif action == "add":
        last_day = None if expires is None else parse_last_day(expires)
        if last_day and last_day < datetime.now(UTC).date():
            raise StartError(f"--expires is {last_day}, which has passed; the key would never work")
        key = add_key(path, name, parse_scopes(",".join(scope or [Scope.CLASSIFY])), last_day)
        print(key)
        print(
            f"fovea: this is the key {name!r}; keep it now, because {path} has only its SHA-256",
            file=sys.stderr,
        )
    else:
        remove_key(path, name)
        print(f"removed the key {name!r} from {path}; a running service refuses it in a moment")


def _print_keys(all_keys: tuple[ApiKey, ...], *, as_json: bool) -> None:
    """Print the keys of a file, without their digests."""
    import time

    import orjson

    from fovea.service.access.caller import Scope

    if as_json:
        rows = [
            {
                "name": key.name,
                "scopes": [scope.value for scope in Scope if scope in key.scopes],
                "last_day": key.last_day and key.last_day.isoformat(),
                "expired": key.expires_at <= time.time(),
            }
            for key in all_keys
        ]
        print(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    width = max((len(key.name) for key in all_keys), default=0)
    for key in all_keys:
        scopes = ",".join(scope for scope in Scope if scope in key.scopes)
        end = f"  until {key.last_day}" if key.last_day else ""
        print(f"{key.name:{width}}  {scopes}{end}{' (expired)' if key.expires_at <= time.time() else ''}")
    if not all_keys:
        print("there are no keys: nobody is let in")
