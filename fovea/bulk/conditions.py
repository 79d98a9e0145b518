"""Conditions that select rows, such as `probability < 0.6 or error is not null` (`--where`).

    condition  := conjunction ("or" conjunction)*
    conjunction := negation ("and" negation)*
    negation   := "not" negation | "(" condition ")" | test
    test       := value comparison value | value "is" ["not"] "null"
                | value ["not"] "in" ("(" literal ("," literal)* ")" | list column)
                | boolean column
    comparison := "=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">="
    value      := column | literal
    literal    := number | text in ' or " | "true" | "false"

Missing values follow SQL: a comparison with a missing value is neither true nor false, and a row is selected
only if its condition is true. A quote within a text is doubled.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from fovea.bulk.columns import COLUMN_TYPES, ColumnType
from fovea.bulk.rows import Row
from fovea.errors import StartError

Condition: TypeAlias = Callable[[Row], bool | None]
"""Function that returns whether a row meets a condition; None if a value that decides is missing."""

_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
      | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign>==|!=|<>|<=|>=|[=<>(),])
    )""",
    re.VERBOSE,
)

_KEYWORDS: Final = frozenset({"and", "or", "not", "in", "is", "null", "true", "false"})

_LIST_ITEMS: Final = {ColumnType.TEXTS: ColumnType.TEXT, ColumnType.NUMBERS: ColumnType.NUMBER}
"""Type of the values in a list column."""

_MAX_QUOTE: Final = 100
"""Number of characters of a condition that an error shows."""

_MAX_DEPTH: Final = 50
"""Largest depth of parentheses and of `not`."""


def parse_condition(text: str) -> Condition:
    """Return the condition that a text states.

    Raises `StartError` that says what is wrong at which place, and lists the columns if one is unknown.
    """
    parser = _Parser(text)
    condition = parser.parse_condition(0)
    if parser.token.kind != "end":
        raise parser.create_error(f"{_quote(parser.token.text)} is not expected here")
    return condition


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}…"


def _quote(text: str) -> str:
    return repr(_shorten(text))


class _Token(NamedTuple):
    kind: str
    """`number`, `text`, `word`, `keyword`, `sign` or `end`."""
    text: str
    start: int


class _Value(NamedTuple):
    """A side of a comparison."""

    type: ColumnType
    get: Callable[[Row], Any]
    text: str
    is_column: bool


class _Parser:
    """A parser by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._index = 0

    @property
    def token(self) -> _Token:
        return self._tokens[self._index]

    def create_error(self, problem: str) -> StartError:
        """Return an error that shows the rest of the text."""
        rest = self._text[self.token.start :]
        return self._create_error_at(rest, problem)

    def _create_error_at(self, rest: str, problem: str) -> StartError:
        place = f"at {_quote(rest)}" if rest.strip() else "at the end"
        return StartError(f"--where {_quote(self._text)}: {problem} ({place})")

    def _split(self) -> list[_Token]:
        tokens: list[_Token] = []
        position, end = 0, len(self._text.rstrip())
        while position < end:
            match = _TOKEN.match(self._text, position)
            if match is None:
                rest = self._text[position:].lstrip()
                problem = "a text has no end" if rest[0] in "'\"" else f"{rest[0]!r} is not expected"
                raise self._create_error_at(rest, problem)
            kind = str(match.lastgroup)
            text, start = match[kind], match.start(kind)
            if kind == "word" and text.lower() in _KEYWORDS and text not in COLUMN_TYPES:
                kind, text = "keyword", text.lower()
            tokens.append(_Token(kind, text, start))
            position = match.end()
        return [*tokens, _Token("end", "", len(self._text))]

    def _take(self, *texts: str) -> str | None:
        """Take the next token if it is a keyword or a sign among these; return its text."""
        token = self.token
        if token.kind in ("keyword", "sign") and token.text in texts:
            self._index += 1
            return token.text
        return None

    def _require(self, text: str) -> None:
        if self._take(text) is None:
            raise self.create_error(f"{text!r} is missing")

    def parse_condition(self, depth: int) -> Condition:
        parts = [self._parse_conjunction(depth)]
        while self._take("or"):
            parts.append(self._parse_conjunction(depth))
        return parts[0] if len(parts) == 1 else _any_of(parts)

    def _parse_conjunction(self, depth: int) -> Condition:
        parts = [self._parse_negation(depth)]
        while self._take("and"):
            parts.append(self._parse_negation(depth))
        return parts[0] if len(parts) == 1 else _all_of(parts)

    def _parse_negation(self, depth: int) -> Condition:
        if depth > _MAX_DEPTH:
            raise self.create_error(f"more than {_MAX_DEPTH} levels of parentheses and `not`")
        if self._take("not"):
            return _negate(self._parse_negation(depth + 1))
        if self._take("("):
            condition = self.parse_condition(depth + 1)
            self._require(")")
            return condition
        return self._parse_test()

    def _parse_test(self) -> Condition:
        value = self._parse_value()
        if self._take("is"):
            is_negated = self._take("not") is not None
            self._require("null")
            return _test_missing(value.get, is_negated)
        is_negated = self._take("not") is not None
        if self._take("in"):
            condition = self._parse_membership(value)
            return _negate(condition) if is_negated else condition
        if is_negated:
            raise self.create_error("'in' is missing")
        if sign := self._take(*_COMPARISONS):
            other = self._parse_value()
            self._check_types(value, other, sign)
            return _compare(value.get, other.get, _COMPARISONS[sign])
        if value.is_column and value.type is ColumnType.BOOLEAN:
            return value.get
        raise self.create_error(f"a comparison is missing after {value.text}")

    def _parse_membership(self, value: _Value) -> Condition:
        if value.type in _LIST_ITEMS:
            raise self.create_error(f"{value.text} is a {value.type.value}; write the value before `in`")
        if self._take("("):
            others = [self._parse_literal()]
            while self._take(","):
                others.append(self._parse_literal())
            self._require(")")
            for other in others:
                self._check_types(value, other, "=")
            return _test_membership(value.get, {other.get(_NO_ROW) for other in others})
        column = self._parse_value()
        if not column.is_column or column.type not in _LIST_ITEMS:
            raise self.create_error("after `in` comes a list such as ('cat', 'dog'), or a column of lists")
        item = _Value(_LIST_ITEMS[column.type], column.get, f"each of {column.text}", True)
        self._check_types(value, item, "=")
        return _compare(value.get, column.get, lambda one, many: one in many)

    def _parse_literal(self) -> _Value:
        value = self._parse_value()
        if value.is_column:
            raise self.create_error(f"a list holds numbers and texts, not the column {value.text}")
        return value

    def _parse_value(self) -> _Value:
        kind, text, _ = token = self.token
        literal: Any
        if kind == "number":
            literal, value_type = float(text), ColumnType.NUMBER
            if not math.isfinite(literal):
                raise self.create_error(f"{_shorten(text)} is too large")
        elif kind == "text":
            literal, value_type = text[1:-1].replace(text[0] * 2, text[0]), ColumnType.TEXT
        elif kind == "keyword" and text in ("true", "false"):
            literal, value_type = text == "true", ColumnType.BOOLEAN
        elif kind == "word":
            if text not in COLUMN_TYPES:
                raise self._create_column_error(text)
            self._index += 1
            return _Value(COLUMN_TYPES[text], operator.attrgetter(text), text, True)
        else:
            problem = f"{_quote(text)} is not expected here" if token.kind != "end" else "a value is missing"
            raise self.create_error(problem)
        self._index += 1
        return _Value(value_type, lambda _: literal, _shorten(text), False)

    def _create_column_error(self, name: str) -> StartError:
        nearest = difflib.get_close_matches(name, COLUMN_TYPES, n=1)
        advice = f"did you mean {nearest[0]}? " if nearest else ""
        return self.create_error(
            f"there is no column {_shorten(name)}; {advice}the columns are {', '.join(COLUMN_TYPES)}. "
            "Put a text in quotes"
        )

    def _check_types(self, one: _Value, other: _Value, sign: str) -> None:
        """Raise `StartError` unless two values can be compared."""
        types = {ColumnType.NUMBER if v.type is ColumnType.INTEGER else v.type for v in (one, other)}
        if types & _LIST_ITEMS.keys():
            value = one if one.type in _LIST_ITEMS else other
            raise self.create_error(
                f"{value.text} is a {value.type.value}; test it with `'cat' in labels` or `is null`"
            )
        if len(types) > 1:
            raise self.create_error(
                f"{one.text} is a {one.type.value} and {other.text} a {other.type.value}; they never compare"
            )
        if types == {ColumnType.BOOLEAN} and sign not in ("=", "==", "!=", "<>"):
            raise self.create_error(f"{sign} compares numbers and texts; a boolean takes = and !=")


_NO_ROW: Final = Row("")


def _any_of(parts: Sequence[Condition]) -> Condition:
    def condition(row: Row) -> bool | None:
        result: bool | None = False
        for part in parts:
            value = part(row)
            if value:
                return True
            if value is None:
                result = None
        return result

    return condition


def _all_of(parts: Sequence[Condition]) -> Condition:
    def condition(row: Row) -> bool | None:
        result: bool | None = True
        for part in parts:
            value = part(row)
            if value is False:
                return False
            if value is None:
                result = None
        return result

    return condition


def _negate(part: Condition) -> Condition:
    def condition(row: Row) -> bool | None:
        value = part(row)
        return None if value is None else not value

    return condition


def _test_missing(get: Callable[[Row], Any], is_negated: bool) -> Condition:
    return lambda row: (get(row) is None) is not is_negated


def _compare(
    get: Callable[[Row], Any], get_other: Callable[[Row], Any], compare: Callable[[Any, Any], bool]
) -> Condition:
    def condition(row: Row) -> bool | None:
        one, other = get(row), get_other(row)
        return None if one is None or other is None else compare(one, other)

    return condition


def _test_membership(get: Callable[[Row], Any], values: set[Any]) -> Condition:
    def condition(row: Row) -> bool | None:
        value = get(row)
        return None if value is None else value in values

    return condition
