"""Errors can be pickled and copied, so that they can be sent to another process."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path

import pytest

import fovea
from fovea.service.errors import BodyTimeout, FoveaError, Overloaded, to_one_line

VALUES = {"float": 2.5, "int": 3, "str": "café: what was wrong"}
"""An argument for each type of constructor parameter."""


def list_modules() -> Iterator[str]:
    """Yield the names of all modules except scripts."""
    for module in pkgutil.walk_packages(fovea.__path__, "fovea."):
        if not module.name.endswith(("__main__", "_server", ".tutorial")):  # scripts
            yield module.name


def list_errors() -> list[type[FoveaError]]:
    """Return all error classes of the project, from all modules."""
    for name in list_modules():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert error.name is not None
            assert not error.name.startswith("fovea")
    kinds = [FoveaError]
    for kind in kinds:
        kinds.extend(child for child in kind.__subclasses__() if child not in kinds)
    return [kind for kind in kinds if not kind.__module__.startswith("tests.")]


def make_error(kind: type[FoveaError]) -> FoveaError:
    """Return an error with a value for each parameter of its constructor."""
    positional: list[object] = []
    keywords: dict[str, object] = {}
    for argument in list(signature(kind.__init__).parameters.values())[1:]:
        if argument.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            continue
        value = Path("x") if "Path" in str(argument.annotation) else VALUES.get(str(argument.annotation), "x")
        if argument.kind is Parameter.KEYWORD_ONLY:
            keywords[argument.name] = value
        else:
            positional.append(value)
    return kind(*(positional or ["what was wrong"]), **keywords)


def test_every_error_survives_pickle_and_copy() -> None:
    kinds = list_errors()
    assert {"Overloaded", "Draining", "BodyTimeout", "ImportRefused", "DataError"} <= {
        kind.__name__ for kind in kinds
    }
    for kind in kinds:
        error = make_error(kind)
        protocols = range(pickle.HIGHEST_PROTOCOL + 1)
        for duplicate in (
            *(pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols),  # noqa: S301 - ours
            copy.copy(error),
        ):
            assert type(duplicate) is kind
            assert (str(duplicate), duplicate.args, vars(duplicate)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("error", [Overloaded("the queue is full", retry_after=1.5), BodyTimeout(30.0)])
def test_pickled_error_keeps_message_and_retry_after(error: FoveaError) -> None:
    duplicate = pickle.loads(pickle.dumps(error))  # noqa: S301 - written on the line
    assert str(duplicate) == str(error)
    assert getattr(duplicate, "retry_after", None) == getattr(error, "retry_after", None)


def test_long_message_keeps_its_end() -> None:
    line = to_one_line(ValueError(f"it is wrong: {'x' * 10_000}\nsuch as: fovea import model.onnx"))
    assert line.startswith("it is wrong: xxx")
    assert line.endswith("xxx such as: fovea import model.onnx")
    assert len(line) < 1600
