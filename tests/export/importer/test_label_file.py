"""Files of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import read_labels
from fovea.export.importer.label_lines import _is_heading
from fovea.export.importer.labelled_images import LabelLookup

PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
"""Text without space at its ends or control characters."""

LABELS = st.lists(
    PRINTABLE.filter(lambda text: text[0] not in "[{" and not _is_heading(text)),
    min_size=2,
    max_size=8,
    unique=True,
)
"""Labels that look neither like JSON nor like a column heading."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels") / "labels"


@settings(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.integers(0, 3))
def test_one_a_line_in_any_text_file(
    file: Path, names: list[str], end: str, marked: bool, blank: int
) -> None:
    """Lines may have a byte order mark, any line ends, and blank lines at the end."""
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
    """Equal labels get numbers, such as ImageNet's two cranes, the bird and the machine."""
    file.write_text("tench\ncrane\nmaillot\ncrane\nmaillot\n")
    labels = read_labels(file)
    assert labels.names == ("tench", "crane (1)", "maillot (2)", "crane (3)", "maillot (4)")
    assert labels.shared_names == ("crane", "maillot")


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
        (b"a\nb\x07\n", "label 1 is 'b.x07', which is empty or not printable"),
        (b'["a", "b"', "begins like JSON, but is not valid: "),
        (b"[" * 100_000, "begins like JSON, but is not valid: "),
        (b'["a", 7]', "label 1 is 7, which is not text"),
        (b'["a", ["x", "y"]]', r'label 1 is \["x", "y"\], which is not text'),
        (b'["a", ""]', "label 1 is '', which is empty or not printable"),
        (b'["a", "\\ud800"]', "which is empty or not printable"),
        (b"{}", "must map the numbers from 0 on to labels"),
        (b'{"id2label": 3}', "must map the numbers from 0 on to labels"),
        (b'{"0": "a", "b": "c"}', "must map the numbers from 0 on to labels"),
        (b'{"0": "a", "2": "b"}', "it has 2 entries, and none for 1"),
        (b'{"a": 0, "b": 0}', "it has 2 entries, and none for 1"),
        (b'{"a": 0, "b": true}', "must map the numbers"),
        (b"a\na\na (1)\n", "has duplicate labels, and labels that already end in a number; rename them"),
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


# --- more than a label on each line ---------------------------------------------------------------

TENCH = ("tench, Tinca tinca", "goldfish", "great white's")
"""Labels with a comma and an apostrophe."""


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "form",
    [
        "{0},{1}",
        "{0}: {1}",
        "{0}\t{1}",
        "{0}; {1}",
        "{0}. {1}",
        "{0} -> {1}",
        '{0},"{1}"',
        "{1},{0}",
        "{1}\t{0}",
    ],
)
def test_numbers_beside_labels_are_their_places(
    file: Path, form: str, end: str, mark: bytes, first: int, order: tuple[int, ...]
) -> None:
    lines = [form.format(place + first, TENCH[place]) for place in order]
    file.write_bytes(mark + (end.join(lines) + end + end).encode())
    labels = read_labels(file)
    assert labels.names == TENCH
    assert f"in the order of their numbers, {first} to {first + 2}" in labels.notes


TWELVE = tuple(f"bird {number}x" for number in range(12))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0 tench\n1 goldfish\n", ("tench", "goldfish")),
        ("\n".join(f"{place + 1} {name}" for place, name in enumerate(TWELVE)), TWELVE),
        ("0,n01440764,tench\n1,n01443537,goldfish", ("tench", "goldfish")),
        ("n01440764,tench\nn01443537,goldfish", ("tench", "goldfish")),
        ("id,label\n1,goldfish\n0,tench\n", ("tench", "goldfish")),
        ("ClassId;Name\n0;tench\n1;goldfish", ("tench", "goldfish")),
        ("label,index\ntench,0\ngoldfish,1", ("tench", "goldfish")),
        ("class\tlabel\n0\ttench\n1\tgoldfish", ("tench", "goldfish")),
        ("id,wnid,name\n1,n01443537,goldfish\n0,n01440764,tench", ("tench", "goldfish")),
        ("label\ntench\ngoldfish\n", ("tench", "goldfish")),
        ("names:\n  0: tench\n  1: goldfish\n", ("tench", "goldfish")),
        ("- tench\n- goldfish\n", ("tench", "goldfish")),
        ("'tench',\n'goldfish',\n", ("tench", "goldfish")),
        ("{0: 'tench, Tinca tinca',\n 1: \"great white's\"}", ("tench, Tinca tinca", "great white's")),
        ("['tench', 'goldfish']", ("tench", "goldfish")),
        ('{"tench": "0", "goldfish": "1"}', ("tench", "goldfish")),
        ('[[1, "goldfish"], [0, "tench"]]', ("tench", "goldfish")),
        ('[{"id": 1, "name": "goldfish"}, {"id": 0, "name": "tench"}]', ("tench", "goldfish")),
        ('{"classes": ["tench", "goldfish"]}', ("tench", "goldfish")),
        (
            '{"id2label": {"0": "tench", "1": "goldfish"}, "label2id": {"tench": 0, "goldfish": 1}}',
            ("tench", "goldfish"),
        ),
    ],
)
def test_forms_of_other_tools_are_read_as_they_are_meant(
    file: Path, text: str, names: tuple[str, ...]
) -> None:
    file.write_text(text)
    assert read_labels(file).names == names


@pytest.mark.parametrize(
    "names",
    [
        ("1 euro", "2 euro", "5 euro"),
        ("1 finger", "2 finger"),
        ("0", "1", "2"),
        ("7", "3", "5"),
        ("label 0", "label 1"),
        ("0.5 mm", "1.0 mm"),
        ("speed 20", "speed 30"),
        ("001.Black_footed_Albatross", "002.Laysan_Albatross"),
        ("tench, Tinca tinca", "goldfish, Carassius auratus"),
        ("T-shirt/top", "Ankle boot"),
    ],
)
def test_numbers_that_belong_to_labels_stay(file: Path, names: tuple[str, ...]) -> None:
    file.write_text("\n".join(names))
    labels = read_labels(file)
    assert (labels.names, labels.notes) == (names, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0,a\n1,b\n3,c",
            "each from 0 .or 1. on exactly once: there are 3 numbers up to 3, and 2 is missing",
        ),
        ("0,a\n0,b\n1,c", "0 occurs 2 times"),
        ("a,0\nb,1\nc,5", "up to 5, and 2 is missing"),
        ("0,a\n1,b\nc", "most lines have a number beside the label, but line 3, 'c', has none"),
        ("10:30\n11:00\n12:00", "if they are part of the labels, write the labels as a JSON list"),
        ("1 door\n2 doors\n", "may be part of the labels or the numbers of the outputs"),
        ("id,label\n0,a\n2,b", "the column 'id' must have each number .* and 1 is missing"),
        ("id,label\nx,a\ny,b", "'x' is not a number"),
        ("class,name\na,b\nc,d", "its columns are class, name; one column of labels is needed"),
        ("label,name,id\na,b,0\nc,d", "line 3 has 2 columns"),
        ("{0: 'a', 0: 'b', 1: 'c'}", "has the key '0' twice"),
        ('{"0": "a", "0": "b", "1": "c"}', "has the key '0' twice"),
        ('{"0": "1", "1": "2", "2": "0"}', "can be read in both directions"),
        (
            '{"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}',
            "contradicts itself: id2label has 'a'",
        ),
        ("{'a', 'b'}", "must be a list of labels"),
        ("{0: open('x')}", "begins like JSON, but is not"),
        (
            "item {\n  id: 1\n  name: 'a'\n}\nitem {\n  id: 2\n  name: 'b'\n}",
            "is neither a list of labels nor JSON",
        ),
        ("labels = [\n'a',\n'b']", "is neither a list of labels nor JSON"),
        ("<!DOCTYPE html>\n<html>\n<body>", "is a web page or XML"),
        ("# from the paper\na\nb", "line 1, '# from the paper', looks like a comment"),
    ],
)
def test_lines_that_could_be_misread_are_refused(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(ImportRefused, match=message) as raised:
        read_labels(file)
    assert str(file) in str(raised.value)


def test_labels_that_look_alike_are_named(file: Path) -> None:
    file.write_text("Cardigan\ncardigan\ncafé\ncafe\u0301\nhot  dog\nhot dog\n")
    labels = read_labels(file)
    assert labels.names == ("Cardigan", "cardigan", "café (2)", "café (3)", "hot  dog", "hot dog")
    assert labels.shared_names == ("café",)
    assert labels.notes == (
        "'Cardigan' and 'cardigan' differ only in case or spaces: are they two labels?",
        "'hot  dog' and 'hot dog' differ only in case or spaces: are they two labels?",
    )


def test_a_folder_belongs_to_the_label_of_its_very_name(file: Path) -> None:
    file.write_text("Cardigan\ncardigan\ncafé\n")
    find = LabelLookup(read_labels(file))
    assert [find("cardigan"), find("Cardigan"), find("cafe\u0301"), find("CAFÉ")] == [1, 0, 2, 2]
    with pytest.raises(ImportRefused, match="fits several labels: 'Cardigan', 'cardigan'"):
        find("CARDIGAN")
