"""The conditions of `--where`."""

from __future__ import annotations

import re

import pytest

from fovea.bulk.columns import COLUMN_TYPES
from fovea.bulk.conditions import parse_condition
from fovea.bulk.rows import Row
from fovea.errors import StartError

CAT = Row("a/cat.jpg", "cat", 0.5, ("cat", "dog"), (0.5, 0.25), ("cat", "dog"), True, 1.5, 640, 480, "JPEG")
ERROR = Row("b/x.png", error="bad_image", message="it's broken")


@pytest.mark.parametrize(
    ("text", "cat", "error"),
    [
        ("probability < 0.6", True, False),
        ("probability<.6", True, False),
        ("probability >= 5e-1", True, False),
        ("probability > +0.5", False, False),
        ("not probability > 0.5", True, False),
        ("not (probability > 0.4)", False, False),
        ("probability is null", False, True),
        ("probability IS NOT NULL", True, False),
        ("error is null or error = 'bad_image'", True, True),
        ("error = 'bad_image' and probability < 1", False, False),
        ("error = 'bad_image' or probability < 1", True, True),
        ("label = 'cat'", True, False),
        ('label == "cat"', True, False),
        ("label != 'dog'", True, False),
        ("label <> 'cat'", False, False),
        ("label in ('dog', 'cat')", True, False),
        ("label not in ('dog')", True, False),
        ("width in (640, 641.5)", True, False),
        ("'dog' in labels", True, False),
        ("'cow' not in label_set", True, False),
        ("0.25 in probabilities", True, False),
        ("label in labels", True, False),
        ("known", True, False),
        ("not known", False, False),
        ("known = true and not known = false", True, False),
        ("width > height", True, False),
        ("width > height and width > 1000 or format = 'JPEG'", True, False),
        ("width > height and (width > 1000 or format = 'PNG')", False, False),
        ("path >= 'b'", False, True),
        ("message = 'it''s broken'", False, True),
        ("1 < 2", True, True),
    ],
)
def test_condition_selects(text: str, cat: bool, error: bool) -> None:
    condition = parse_condition(text)
    assert (bool(condition(CAT)), bool(condition(ERROR))) == (cat, error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "probabilty < 0.6",
            "there is no column probabilty; did you mean probability? the columns are path, ",
        ),
        ("label = cat", "there is no column cat; the columns are path, label, .*. Put a text in quotes"),
        ("", "a value is missing (at the end)"),
        ("probability <", "a value is missing (at the end)"),
        ("probability", "a comparison is missing after probability (at the end)"),
        ("'cat'", "a comparison is missing after 'cat' (at the end)"),
        ("probability < 0.6 label", "'label' is not expected here (at 'label')"),
        ("probability < 'x'", "probability is a number and 'x' a text; they never compare"),
        ("known > true", "> compares numbers and texts; a boolean takes = and !="),
        ("labels = 'cat'", "labels is a list of texts; test it with `'cat' in labels` or `is null`"),
        ("labels in ('cat')", "labels is a list of texts; write the value before `in`"),
        ("1 in labels", "1 is a number and each of labels a text; they never compare"),
        ("label in (width)", "a list holds numbers and texts, not the column width"),
        ("label in path", "after `in` comes a list such as ('cat', 'dog'), or a column of lists"),
        ("label in ('cat'", "')' is missing (at the end)"),
        ("label not 'cat'", "'in' is missing (at \"'cat'\")"),
        ("label is 'cat'", "'null' is missing (at \"'cat'\")"),
        ("label = 'cat", 'a text has no end (at "\'cat")'),
        ("probability < 0.6; import os", "';' is not expected (at '; import os')"),
        ("__import__('os')", "there is no column __import__; "),
        ("label.upper() = 'x'", "'.' is not expected (at \".upper() = 'x'\")"),
        ("probability < 1e999", "1e999 is too large"),
        ("probability < 0.6x", "'0' is not expected (at '0.6x')"),
        ("(" * 1000 + "known", "more than 50 levels of parentheses and `not`"),
        ("not " * 1000 + "known", "more than 50 levels of parentheses and `not`"),
    ],
)
def test_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(StartError) as error:
        parse_condition(text)
    start = f"--where {text if len(text) <= 100 else text[:100] + '…'!r}: "
    assert str(error.value).startswith(start)
    rest = str(error.value)[len(start) :]
    assert rest.startswith(message) or re.match(message, rest), rest


@pytest.mark.parametrize(
    "text",
    [
        "label = 'cat' " * 10_000,
        f"label = {'x' * 100_000}",
        f"label > {'9' * 100_000}",
        f"'{'x' * 100_000}'",
        f"label = 'cat' '{'x' * 100_000}'",
        f"label = '{'x' * 100_000}",
        f"width = '{'x' * 100_000}'",
        f"known ; {'x' * 100_000}",
    ],
)
def test_long_condition_is_shown_by_its_start(text: str) -> None:
    with pytest.raises(StartError, match="…") as error:
        parse_condition(text)
    assert len(str(error.value)) < 600


def test_unknown_column_lists_all_columns() -> None:
    with pytest.raises(StartError, match=re.escape(", ".join(COLUMN_TYPES))):
        parse_condition("nothing = 1")
