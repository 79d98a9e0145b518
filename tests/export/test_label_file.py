"""Files of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.foreign import ImportRefused
from export.label_file import read_labels

PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
"""Text in which nothing is to be trimmed."""

LABELS = st.lists(PRINTABLE.filter(lambda text: text[0] not in "[{"), min_size=2, max_size=8, unique=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels") / "labels"


@settings(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.integers(0, 3))
def test_one_a_line_in_any_text_file(
    file: Path, names: list[str], end: str, marked: bool, blank: int
) -> None:
    """With or without a byte order mark, any line ends, blank lines at the end."""
    file.write_bytes((end.join(names) + end * blank).encode("utf-8-sig" if marked else "utf-8"))
    assert read_labels(file).names == tuple(names)


@settings(max_examples=60, deadline=None)
@given(
    LABELS,
    st.randoms(use_true_random=False),
    st.sampled_from(["list", "numbers", "keras", "inverse", "config"]),
)
def test_every_form_of_json_says_the_same(file: Path, names: list[str], random: object, form: str) -> None:
    places = list(enumerate(names))
    random.shuffle(places)  # type: ignore[attr-defined]  # hypothesis has no type for it
    forms = {
        "list": names,
        "numbers": {str(place): name for place, name in places},
        "keras": {str(place): [f"n{place:08}", name] for place, name in places},
        "inverse": {name: place for place, name in places},
        "config": {"model_type": "vit", "id2label": {str(place): name for place, name in places}},
    }
    file.write_text(json.dumps(forms[form]))
    labels = read_labels(file)
    assert labels.names == tuple(names)
    if form == "keras":
        assert labels.ids == tuple(f"n{place:08}" for place in range(len(names)))


def test_labels_of_several_outputs_get_their_numbers(file: Path) -> None:
    """As ImageNet's two cranes, the bird and the machine."""
    file.write_text("tench\ncrane\nmaillot\ncrane\nmaillot\n")
    labels = read_labels(file)
    assert labels.names == ("tench", "crane (1)", "maillot (2)", "crane (3)", "maillot (4)")
    assert labels.renamed == ("crane", "maillot")


def test_ids_of_wordnet_are_kept_and_known(file: Path) -> None:
    file.write_text("n01440764 tench, Tinca tinca\nn01443537\tgoldfish\n")
    labels = read_labels(file)
    assert labels.names == ("n01440764 tench, Tinca tinca", "n01443537 goldfish")
    assert labels.ids == ("n01440764", "n01443537")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 labels; at least two are needed"),
        (b"one\n", "has 1 labels"),
        (b"a\n\nb\n", "line 2 is empty; each line is a label"),
        (b"a\xff\nb", "is not UTF-8 text"),
        (b"a\nb\x07\n", "label 1 is 'b.x07', which cannot be shown"),
        (b'["a", "b"', "begins like JSON, but is not: "),
        (b"[" * 100_000, "begins like JSON, but is not: "),
        (b'["a", 7]', "label 1 is 7, which is not text"),
        (b'["a", ["x", "y"]]', r'label 1 is \["x", "y"\], which is not text'),
        (b'["a", ""]', "label 1 is '', which cannot be shown"),
        (b'["a", "\\ud800"]', "which cannot be shown"),
        (b"{}", "must map the numbers from 0 on to labels"),
        (b'{"id2label": 3}', "must map the numbers from 0 on to labels"),
        (b'{"0": "a", "b": "c"}', "must map the numbers from 0 on to labels"),
        (b'{"0": "a", "2": "b"}', "it has 2, and none for 1"),
        (b'{"a": 0, "b": 0}', "it has 2, and none for 1"),
        (b'{"a": 0, "b": true}', "must map the numbers"),
        (b"a\na\na (1)\n", "has labels twice, and others that end in a number; rename them"),
    ],
)
def test_files_that_cannot_be_used(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ImportRefused, match=message) as raised:
        read_labels(file)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"cannot read the labels .*gone: No such file"):
        read_labels(tmp_path / "gone")
