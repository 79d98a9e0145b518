"""The `fovea` command: its sub-commands, and error messages for the terminal.

Each sub-command imports its packages in its function, when it runs. This keeps the start fast, and lets the
service's commands run in an installation without torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from fovea.commands.bench import bench, doctor
from fovea.commands.classify import classify, explain
from fovea.commands.examples import EXAMPLES, SUMMARIES
from fovea.commands.export import export
from fovea.commands.import_ import import_
from fovea.commands.keys import keys
from fovea.commands.models import models
from fovea.commands.publish import publish
from fovea.commands.quantize import quantize
from fovea.commands.remove import remove
from fovea.commands.serve import serve
from fovea.commands.show import show
from fovea.commands.train import train
from fovea.service import __version__
from fovea.service.errors import FoveaError, to_one_line

_TRAINING_MODULES: Final = frozenset({"torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"})
"""Packages that training, export and import need, and that the runtime installation lacks."""

_CHECKOUT_PACKAGES: Final = frozenset({"fovea.model", "fovea.export", "fovea.bench"})
"""Packages of this repository that the container image lacks."""

_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "train": train,
    "export": export,
    "import": import_,
    "quantize": quantize,
    "serve": serve,
    "publish": publish,
    "models": models,
    "show": show,
    "remove": remove,
    "keys": keys,
    "classify": classify,
    "explain": explain,
    "bench": bench,
    "doctor": doctor,
}
"""The sub-commands in the order of the help. The parameters of each function declare its options."""

_METAVARS: Final = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "FLOAT"}


class _CommandGroup(TyperGroup):
    """The group of sub-commands, with an example and the types of the options in each help text."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command `cmd_name` with its example and summary; None if there is none."""
        # Click calls this for the command line's sub-command, and once per command to list them in the help.
        command = super().get_command(ctx, cmd_name)
        if command is None:
            return None
        command.epilog = f"Example: {EXAMPLES[cmd_name]}"
        command.short_help = SUMMARIES.get(cmd_name, command.short_help)
        parameter: Any
        for parameter in command.params:
            kind = _parameter_type(cmd_name, parameter.name)
            if kind is not None and kind is not bool and parameter.metavar is None:
                name = _METAVARS.get(kind) or f"[{'|'.join(map(str, get_args(kind)))}]"
                parameter.metavar = name
                if parameter.param_type_name == "argument":
                    parameter.metavar = str(parameter.name).upper()
                    parameter.display_type = lambda _, name=name: name
        return command


def _parameter_type(command: str, parameter: str | None) -> Any:
    """Return the type of one value of a command's parameter; None for `--help` and unknown commands."""
    if command not in _COMMANDS or parameter is None:
        return None
    kind = get_type_hints(_COMMANDS[command]).get(parameter)
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    return get_args(kind)[0] if get_origin(kind) is list else kind


app = typer.Typer(
    cls=_CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train or import an image classifier as one self-describing ONNX file, and serve it.",
)


def _show_version(is_requested: bool) -> None:
    if is_requested:
        print(f"fovea {__version__}")
        raise typer.Exit


@app.callback()
def _handle_main_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Handle options before the sub-command."""


for _name, _function in _COMMANDS.items():
    app.command(_name)(_function)


# --- errors --------------------------------------------------------------------------------------

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_CommandError: type[Exception] = typer.BadParameter.__mro__[2]
"""Click's `UsageError` and `ClickException`.

They are the base classes of a public class: later versions of Typer contain Click under another name.
"""


def _describe_error(error: Any) -> str:
    """Return a sentence on what is wrong with the command line."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = str(context.info_name) if context else ""
    if parameter is None:
        sentence = str(error.format_message()).rstrip(".")
        command_match = re.fullmatch(r"No such command '(.*?)'.*", sentence, re.DOTALL)
        if command_match:
            return _describe_unknown("command", command_match[1], list(EXAMPLES), "fovea --help")
        option = getattr(error, "option_name", None)
        if option is not None and sentence.startswith("No such option"):
            options = [name for one in context.command.params for name in one.opts] if context else []
            return _describe_unknown("option", str(option), options, f"fovea {command} --help")
        return f"{sentence[:1].lower()}{sentence[1:]}; see `fovea {command} --help`"
    is_argument = parameter.param_type_name == "argument"
    name = parameter.metavar if is_argument else max(parameter.opts, key=len)
    if type(error).__name__ == "MissingParameter":
        return f"`fovea {command}` needs {name}, such as: {EXAMPLES.get(command, '')}"
    kind = _parameter_type(command, parameter.name)
    get_errors = getattr(error.__cause__, "errors", None)
    value = f" is {str(get_errors()[0]['input'])!r}" if get_errors else ""
    return f"'{name}'{value}: it takes {_describe_expected_value(kind, parameter)}"


def _describe_unknown(kind: str, name: str, known: list[str], help_command: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]}?" if nearest else f"see `{help_command}`"
    return f"there is no {kind} {name!r}; {advice}"


def _describe_expected_value(kind: Any, parameter: Any) -> str:
    """Return a description of the values that a parameter takes."""
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}"
    word = {int: "an integer", float: "a number", Path: "a path"}.get(kind, "another value")
    min_value, max_value = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if min_value is not None and max_value is not None:
        return f"{word} from {min_value:g} to {max_value:g}"
    if min_value is not None:
        return f"{word} of at least {min_value:g}"
    return word if max_value is None else f"{word} of at most {max_value:g}"


def _exit_with_error(message: str, code: int = 2) -> None:
    print(f"fovea: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line and exit.

    A user error prints one line to stderr and exits with code 2. An interruption exits with code 130.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack `█`, and a file name may not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Without standalone mode, Click raises its errors here and returns the code of `typer.Exit`.
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here and not at exit, so that a closed pipe raises inside this `try`
        sys.exit(code if isinstance(code, int) else 0)
    except FoveaError as error:
        _exit_with_error(to_one_line(error))
    except ModuleNotFoundError as error:
        if error.name in _CHECKOUT_PACKAGES:
            _exit_with_error(
                "this installation contains only the service; run the command in a checkout of the repository"
            )
        if error.name not in _TRAINING_MODULES:
            raise
        _exit_with_error(f"training, export and import need {error.name}; run `make setup`")
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(getattr(error, "message", error), file=sys.stderr)
            sys.exit(2)
        _exit_with_error(to_one_line(ValueError(_describe_error(error))))
    except _CommandError as error:
        _exit_with_error(to_one_line(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe early, as `head` does
        # The interpreter flushes stdout again at exit; into the closed pipe, that would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        prefix = "" if error.filename is None else f"{os.fsencode(error.filename).decode(errors='replace')}: "
        _exit_with_error(f"{prefix}{error.strerror or to_one_line(error)}")
