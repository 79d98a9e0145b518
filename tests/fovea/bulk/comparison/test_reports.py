"""The comparison in the terminal and as `report.html`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from rich.console import Console

from fovea.bulk.comparison.folder_comparison import FolderComparison, compare_rows
from fovea.bulk.comparison.html_report import write_html_report
from fovea.bulk.comparison.terminal_report import print_comparison
from fovea.bulk.comparison.thumbnails import make_thumbnails
from fovea.bulk.rows import Row
from fovea.errors import FileError, StartError
from fovea.service.artifact.contract import Task
from fovea.service.image_files import ImageEntry
from tests.parsed_page import ParsedPage


class MemoryEntry(NamedTuple):
    """An image in memory, or one that cannot be read."""

    name: str
    content: bytes | None
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        if self.content is None:
            raise FileError("it is gone")
        return self.content


def make_image(width: int, height: int, colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_row(path: str, label: str, probability: float = 0.9) -> Row:
    return Row(path, label, probability, (label,), (probability,), width=600, height=300)


def make_comparison(labels: tuple[str, ...] = ("ant", "bee", "cow")) -> FolderComparison:
    """Return a comparison of images in each label's folder, every third of which is wrong."""
    rows = [
        make_row(f"/photos/{label}/{number}.jpg", labels[(index + (number % 3 == 2)) % len(labels)])
        for index, label in enumerate(labels)
        for number in range(6)
    ]
    rows.append(make_row("/photos/ants/1.jpg", labels[0]))
    rows.append(Row("/photos/bee/broken.jpg", error="bad_image", message="the file is damaged"))
    return compare_rows(rows, labels, Task.MULTICLASS)


def write_report(
    path: Path, comparison: FolderComparison, thumbnails: dict[str, str] | None = None
) -> ParsedPage:
    write_html_report(
        path, comparison, title="photos", facts={"model": "pets 3"}, thumbnails=thumbnails or {}
    )
    return ParsedPage(path.read_text())


def print_text(comparison: FolderComparison) -> str:
    stream = StringIO()
    print_comparison(Console(file=stream, width=100), comparison)
    return stream.getvalue()


@pytest.mark.parametrize("count", [3, 40])
def test_terminal_and_page_say_the_same(tmp_path: Path, count: int) -> None:
    labels = ("ant", "bee", "cow") if count == 3 else tuple(f"label {number:02}" for number in range(count))
    comparison = make_comparison(labels)
    page, text = write_report(tmp_path / "report.html", comparison), print_text(comparison)
    content = (tmp_path / "report.html").read_text()
    for shown_text in (page.text, text):
        assert "66.67%" in shown_text
        assert f"{count * 6} images" in shown_text
        assert f"{comparison.calibration_error:.4f}" in shown_text
        assert "ants: 1 image without a true label" in shown_text
        assert "1 bad_image" in shown_text
        assert "/photos/bee/broken.jpg: bad_image: the file is damaged" in shown_text
    assert ("The most frequent confusions" in text) is (count > 12)
    cells = re.findall(r"<td style='--share:[\d.]+'(?: class=strong)?>(\d*)</td>", content)
    assert sum(int(cell or 0) for cell in cells) == (18 if count == 3 else 0)
    assert not re.search(r"https?:|src=.?//|@import|url\(", content)
    assert "pets 3" in page.text


def test_predictions_of_labels_without_images_are_counted_in_one_column(tmp_path: Path) -> None:
    """Two folders and a model of many labels need a matrix of two labels, not of all."""
    labels = ("ant", "bee", *(f"other {number}" for number in range(500)))
    rows = [
        make_row("/ant/1.jpg", "ant"),
        make_row("/ant/2.jpg", "other 7"),
        make_row("/bee/1.jpg", "other 9"),
    ]
    comparison = compare_rows(rows, labels, Task.MULTICLASS)
    page, text = write_report(tmp_path / "report.html", comparison), print_text(comparison)
    content = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<td style='--share:[\d.]+'(?: class=strong)?>(\d*)</td>", content)
    assert cells == ["1", "", "1", "", "", "1"]
    assert "other labels" in page.text
    assert re.search(r"ant +1 +· +1 *\n bee +· +· +1", text)
    assert "other 499" not in page.text


@pytest.mark.parametrize(
    ("width", "heading"), [(100, "automobile"), (80, "automob…"), (75, "auto…"), (60, None)]
)
def test_matrix_is_printed_where_it_fits_into_the_terminal(width: int, heading: str | None) -> None:
    labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    stream = StringIO()
    print_comparison(Console(file=stream, width=width), make_comparison(tuple(labels)))
    text = stream.getvalue()
    assert ("Rows are true labels" in text) is (heading is not None)
    assert ("The most frequent confusions" in text) is (heading is None)
    if heading:
        matrix = text.partition("predicted labels:\n")[2].splitlines()[:11]
        assert heading in matrix[0].split()
        assert [len(line.split()) for line in matrix] == [10] + [11] * 10
        assert [line.split()[0] for line in matrix[1:]] == labels


def test_names_from_the_user_are_escaped(tmp_path: Path) -> None:
    labels = ("<script>alert(1)</script>", "a & 'b'", '[red]"c"')
    rows = [
        make_row(f"/{labels[1]}/<b>1.jpg", labels[0]),
        make_row("/<img src=x onerror=alert(1)>/1.jpg", labels[0]),
        make_row(f"/{labels[2]}/1.jpg", labels[2]),
        Row("/<i>/2.jpg", error="bad_image", message="<u>"),
    ]
    comparison = compare_rows(rows, labels, Task.MULTICLASS)
    page, text = write_report(tmp_path / "report.html", comparison), print_text(comparison)
    assert not any(page.find_tags(tag) for tag in ("script", "img", "b1.jpg", "u"))
    for shown_text in (page.text, text):
        for name in (labels[1], labels[2], f"/{labels[1]}/<b>1.jpg", "<img src=x onerror=alert(1)>", "<u>"):
            assert name in shown_text


def test_folders_that_match_no_label_give_a_sentence_and_no_accuracy(tmp_path: Path) -> None:
    rows = [make_row("/photos/n01440764/1.jpg", "tench"), make_row("/photos/n01443537/2.jpg", "goldfish")]
    comparison = compare_rows(rows, ("tench", "goldfish"), Task.MULTICLASS)
    page, text = write_report(tmp_path / "report.html", comparison), print_text(comparison)
    sentence = (
        "no folder is named after a label of the model; folders: n01440764, n01443537; "
        "labels: tench, goldfish"
    )
    assert sentence in page.text
    assert sentence in text
    assert "accuracy" not in text
    assert "Confusion" not in page.text


def test_source_that_is_gone_leaves_a_report_without_pictures() -> None:
    comparison = make_comparison()

    def list_nothing() -> Iterator[ImageEntry]:
        yield MemoryEntry("/photos/ant/1.jpg", None)
        raise StartError("there is no bucket any more")

    assert make_thumbnails(list_nothing(), comparison.mistakes, max_bytes=1, max_pixels=1) == {}


def test_mistakes_have_thumbnails_of_their_own_images(tmp_path: Path) -> None:
    """An image that is gone, or that is damaged, has none; other images are not read."""
    rows = [
        make_row("/ant/red.png", "bee", 0.9),
        make_row("/ant/gone.png", "bee", 0.8),
        make_row("/ant/damaged.png", "bee", 0.7),
        make_row("/ant/right.png", "ant", 0.7),
    ]
    comparison = compare_rows(rows, ("ant", "bee"), Task.MULTICLASS)
    entries = [
        MemoryEntry("/ant/right.png", None),
        MemoryEntry("/ant/gone.png", None),
        MemoryEntry("/ant/damaged.png", b"nothing"),
        MemoryEntry("/ant/red.png", make_image(600, 300, "red")),
    ]

    def list_entries_to_the_last() -> Iterator[ImageEntry]:
        yield from entries
        raise AssertionError("all mistakes are found")

    thumbnails = make_thumbnails(
        list_entries_to_the_last(),
        comparison.mistakes,
        max_bytes=10**6,
        max_pixels=10**6,
    )
    assert list(thumbnails) == ["/ant/red.png"]
    page = write_report(tmp_path / "report.html", comparison, thumbnails)
    (image_tag,) = page.find_tags("img")
    content = base64.b64decode((image_tag["src"] or "").removeprefix("data:image/jpeg;base64,"))
    picture = Image.open(BytesIO(content)).convert("RGB")
    assert picture.size == (232, 116)
    assert picture.getpixel((100, 50)) == pytest.approx((254, 0, 0), abs=2)
    assert page.text.count("no picture") == 2
    assert "true label: ant" in page.text
