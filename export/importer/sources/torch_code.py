"""Checks of the code in archives of PyTorch. torch runs this code when it reads or converts an archive.

A program of torch.export is JSON, and torch makes Python of its texts: sympy evaluates sizes, names become
the source of a function, and targets are attributes of the module `torch`, such as `torch.os.system`.
TorchScript has no Python, but operators that write and read files.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused

# --- programs of torch.export --------------------------------------------------------------------

_NAME: Final = re.compile(r"[\w.:+/@-]*", re.ASCII)
"""Names of values, parameters, modules, devices and versions. None of them can call or assign anything."""

_TARGET: Final = re.compile(
    r"torch\.ops\.(?:aten|prims|quantized_decomposed)"
    r"\.(?!save\b|from_file\b)(?:__i?(?:and|or|xor|lshift|rshift)__|_?[A-Za-z0-9]\w*)(?:\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.(?:cond|while_loop|scan|map_impl|associative_scan|invoke_subgraph"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(?:not|int|float|ite|max|min|sqrt)|math\.(?:trunc|floor|ceil)"
    r"|_operator\.(?:eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift"
    r"|getitem)",
    re.ASCII,
)
"""Operators of a classifier, without those that use files."""

_FREE_KEYS: Final = ("as_string", "as_strings", "in_spec", "out_spec", "context")
"""Keys of texts that torch takes as values, or reads as JSON in turn, which is checked then."""

_REFUSED_KEYS: Final = ("__enum__", "default_factory_module")
"""Keys of texts that name a module to import."""

_SYMPY_TEXT: Final = re.compile(r"[\w.+-]+", re.ASCII)
_SYMPY_CONSTRUCTORS: Final = ("Symbol", "Integer", "Float")
"""Functions of sympy that take a text as it is. Others evaluate a text."""

_SYMPY_NAME: Final = re.compile(
    r"[a-z]+\d+"  # symbols
    r"|Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Mod|floor|ceiling|sqrt|Piecewise"
    r"|ExprCondPair|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan"
    r"|StrictGreaterThan|GreaterThan|oo|true|false|zoo|nan|int_oo"
    # those of torch
    r"|CeilDiv|CeilToInt|CleanDiv|FloatPow|FloatTrueDiv|FloorDiv|FloorToInt|Identity|IntTrueDiv"
    r"|IsNonOverlappingAndDenseIndicator|LShift|ModularIndexing|PowByNatural|PythonMod|RShift"
    r"|RoundDecimal|RoundToInt|ToFloat|TruncToFloat|TruncToInt|Where|BitwiseFn_bitwise_and"
    r"|BitwiseFn_bitwise_or|BitwiseFn_bitwise_xor|OpaqueUnaryFn_sqrt|OpaqueUnaryFn_exp"
    r"|OpaqueUnaryFn_log",
    re.ASCII,
)
"""Symbols, functions and constants in sizes."""

_SYMPY_NODES: Final = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Name, ast.Load, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop),
)


@contextmanager
def restrict_json() -> Iterator[None]:
    """Let `json.loads` check the texts of a program and leave out those that no conversion needs.

    The check sees exactly what torch sees, in whichever part of the archive torch finds it.
    """
    loads = json.loads

    def load_checked(text: str | bytes, **options: Any) -> Any:
        value = loads(text)
        _check_value(value)
        return loads(text, **options) if options else value

    json.loads = load_checked  # type: ignore[assignment]
    try:
        yield
    finally:
        json.loads = loads


def check_program_records(file: Path) -> None:
    """Raise `ImportRefused` if an archive has compiled code, which torch would load.

    Takes the names from torch's own reader: another one could see other names.
    """
    import torch

    reader: Any = torch._C.PyTorchFileReader
    if any("aotinductor" in name for name in reader(str(file)).get_all_records()):
        raise ImportRefused("has compiled code, which Fovea does not run; save it with torch.export.save")


def _check_value(value: Any, key: str = "") -> None:
    """Check texts and keys. Empty the metadata of operators and the guards, whose texts would be run."""
    if isinstance(value, list):
        for one in value:
            _check_value(one, key)
    elif isinstance(value, dict):
        if isinstance(value.get("target"), str):
            value["metadata"] = {}
        if "guards_code" in value:
            value["guards_code"] = []
        for inner_key, one in value.items():
            if key == "range_constraints":
                _check_expression(inner_key)
            elif inner_key in _REFUSED_KEYS or not _NAME.fullmatch(inner_key):
                raise _refuse(inner_key)
            _check_value(one, inner_key)
    elif isinstance(value, str):
        if key == "expr_str":
            _check_expression(value)
        elif key in ("target", "as_operator"):
            if not _TARGET.fullmatch(value):
                raise _refuse(value)
        elif (key == "path_name" and value.startswith("custom_obj")) or (
            key not in _FREE_KEYS and not _NAME.fullmatch(value)
        ):  # an object with code of its own
            raise _refuse(value)


def _check_expression(text: str) -> None:
    """Raise `ImportRefused` unless the text is arithmetic of sympy on numbers and symbols."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refuse(text) from None
    plain_texts = set()
    for node in ast.walk(tree):
        if not isinstance(node, _SYMPY_NODES):
            raise _refuse(text)
        if isinstance(node, ast.Name) and not _SYMPY_NAME.fullmatch(node.id):
            raise _refuse(text)
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name):
                raise _refuse(text)
            if node.func.id in _SYMPY_CONSTRUCTORS:
                plain_texts |= {id(one) for one in node.args}
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float):
            is_plain = isinstance(node.value, str) and _SYMPY_TEXT.fullmatch(node.value) is not None
            if not is_plain or id(node) not in plain_texts:
                raise _refuse(text)


def _refuse(text: str) -> ImportRefused:
    return ImportRefused(
        f"has a text that might run any program when torch reads it ({text[:80]!r}); export the model to "
        "ONNX instead"
    )


# --- TorchScript ---------------------------------------------------------------------------------

_FILE_CODE: Final = re.compile(
    r"\b(?:save|from_file)\b|(?<![\w.])ops\b(?!\.(?:prim|quantized|torchvision)\.)", re.ASCII
)
"""Names by which TorchScript reaches operators that write and read files."""

_PLAIN_GETATTR: Final = re.compile(r'\bgetattr\(\s*[\w.]+,\s*"[^"\\]*"\s*\)', re.ASCII)
"""An attribute whose name can be read, as torch writes modules with a number as their name."""


def check_script(file: Path) -> None:
    """Raise `ImportRefused` if the code of TorchScript reaches files. Loading can run this code already.

    Takes the code from torch's own reader.
    """
    import torch

    reader = torch._C.PyTorchFileReader(str(file))
    names = reader.get_all_records()
    if "model.json" in names:
        raise ImportRefused("is TorchScript of before PyTorch 1.2; save it with a newer PyTorch")
    for name in (one for one in names if one.endswith(".py")):
        if found := _find_file_code(reader.get_record(name).decode(errors="replace")):
            raise ImportRefused(
                f"has code that might write or read files ({found!r} in {name}); export the model to "
                "ONNX instead"
            )


def _find_file_code(text: str) -> str:
    """Return a name by which the code might reach files, or an empty text."""
    if found := _FILE_CODE.search(text):
        return found[0]
    count = 1
    while count:  # from the inside out
        text, count = _PLAIN_GETATTR.subn("plain", text)
    return "getattr" if "getattr" in text else ""
