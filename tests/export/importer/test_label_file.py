"""Label files."""

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
def label_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels") / "labels"


@settings(max_examples=60)
@given(LABELS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.integers(0, 3))
def test_one_label_per_line_is_read(
    label_file: Path, names: list[str], end: str, has_mark: bool, blank_lines: int
) -> None:
    """Lines may have a byte order mark, any line ends, and blank lines at the end."""
    label_file.write_bytes((end.join(names) + end * blank_lines).encode("utf-8-sig" if has_mark else "utf-8"))
    assert read_labels(label_file).names == tuple(names)


@settings(max_examples=60)
@given(
    LABELS,
    st.randoms(use_true_random=False),
    st.sampled_from(["list", "numbers", "keras", "inverse", "config"]),
)
def test_every_json_form_gives_the_same_labels(
    label_file: Path, names: list[str], random: object, form: str
) -> None:
    indexed_names = list(enumerate(names))
    random.shuffle(indexed_names)  # type: ignore[attr-defined]  # hypothesis has no type for it
    forms = {
        "list": names,
        "numbers": {str(index): name for index, name in indexed_names},
        "keras": {str(index): [f"n{index:08}", name] for index, name in indexed_names},
        "inverse": {name: index for index, name in indexed_names},
        "config": {"model_type": "vit", "id2label": {str(index): name for index, name in indexed_names}},
    }
    label_file.write_text(json.dumps(forms[form]))
    labels = read_labels(label_file)
    assert labels.names == tuple(names)
    if form == "keras":
        assert labels.ids == tuple(f"n{index:08}" for index in range(len(names)))


def test_duplicate_labels_are_numbered(label_file: Path) -> None:
    """Equal labels, such as ImageNet's two cranes, the bird and the machine, get numbers."""
    label_file.write_text("tench\ncrane\nmaillot\ncrane\nmaillot\n")
    labels = read_labels(label_file)
    assert labels.names == ("tench", "crane (1)", "maillot (2)", "crane (3)", "maillot (4)")
    assert labels.shared_names == ("crane", "maillot")


def test_wordnet_ids_are_kept_and_parsed(label_file: Path) -> None:
    label_file.write_text("n01440764 tench, Tinca tinca\nn01443537\tgoldfish\n")
    labels = read_labels(label_file)
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
def test_invalid_label_files_are_refused(label_file: Path, content: bytes, message: str) -> None:
    label_file.write_bytes(content)
    with pytest.raises(ImportRefused, match=message) as error_info:
        read_labels(label_file)
    assert str(label_file) in str(error_info.value)


def test_missing_label_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"cannot read the labels .*gone: No such file"):
        read_labels(tmp_path / "gone")


# --- lines with more than a label ----------------------------------------------------------------

COMMA_LABELS = ("tench, Tinca tinca", "goldfish", "great white's")
"""Labels with a comma and an apostrophe."""


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("first_number", [0, 1])
@pytest.mark.parametrize("byte_order_mark", [b"", b"\xef\xbb\xbf"])
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
def test_numbers_beside_labels_set_their_order(
    label_file: Path, form: str, end: str, byte_order_mark: bytes, first_number: int, order: tuple[int, ...]
) -> None:
    lines = [form.format(index + first_number, COMMA_LABELS[index]) for index in order]
    label_file.write_bytes(byte_order_mark + (end.join(lines) + end + end).encode())
    labels = read_labels(label_file)
    assert labels.names == COMMA_LABELS
    assert f"in the order of their numbers, {first_number} to {first_number + 2}" in labels.notes


TWELVE_BIRDS = tuple(f"bird {number}x" for number in range(12))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0 tench\n1 goldfish\n", ("tench", "goldfish")),
        ("\n".join(f"{index + 1} {name}" for index, name in enumerate(TWELVE_BIRDS)), TWELVE_BIRDS),
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
def test_label_files_of_other_tools_are_read(label_file: Path, text: str, names: tuple[str, ...]) -> None:
    label_file.write_text(text)
    assert read_labels(label_file).names == names


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
def test_numbers_inside_labels_are_kept(label_file: Path, names: tuple[str, ...]) -> None:
    label_file.write_text("\n".join(names))
    labels = read_labels(label_file)
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
def test_lines_that_could_be_misread_are_refused(label_file: Path, content: str, message: str) -> None:
    label_file.write_text(content)
    with pytest.raises(ImportRefused, match=message) as error_info:
        read_labels(label_file)
    assert str(label_file) in str(error_info.value)


def test_similar_labels_are_noted(label_file: Path) -> None:
    label_file.write_text("Cardigan\ncardigan\ncafé\ncafe\u0301\nhot  dog\nhot dog\n")
    labels = read_labels(label_file)
    assert labels.names == ("Cardigan", "cardigan", "café (2)", "café (3)", "hot  dog", "hot dog")
    assert labels.shared_names == ("café",)
    assert labels.notes == (
        "'Cardigan' and 'cardigan' differ only in case or spaces: are they two labels?",
        "'hot  dog' and 'hot dog' differ only in case or spaces: are they two labels?",
    )


def test_folder_belongs_to_the_label_with_its_exact_name(label_file: Path) -> None:
    label_file.write_text("Cardigan\ncardigan\ncafé\n")
    lookup = LabelLookup(read_labels(label_file))
    assert [lookup("cardigan"), lookup("Cardigan"), lookup("cafe\u0301"), lookup("CAFÉ")] == [1, 0, 2, 2]
    with pytest.raises(ImportRefused, match="fits several labels: 'Cardigan', 'cardigan'"):
        lookup("CARDIGAN")


@pytest.mark.parametrize(
    "config", [{"model_type": "vit", "num_labels": 5}, {"architecture": "resnet18", "num_classes": 1000}]
)
def test_configuration_without_labels_says_so(label_file: Path, config: dict[str, object]) -> None:
    label_file.write_text(json.dumps(config))
    with pytest.raises(
        ImportRefused, match="has no id2label: it configures a model without naming its labels"
    ):
        read_labels(label_file)


def test_placeholders_of_labels_are_noted(label_file: Path) -> None:
    label_file.write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    labels = read_labels(label_file)
    assert labels.names == ("LABEL_0", "LABEL_1")
    assert "placeholders" in labels.notes[0]
