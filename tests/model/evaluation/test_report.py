"""`report.html`: complete, safe, and a single file."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fovea.model.data.dataset import Dataset, Examples, square_geometry
from fovea.model.evaluation.calibration import fit_calibration
from fovea.model.evaluation.finalize import measure_part
from fovea.model.evaluation.plots import choose_ticks
from fovea.model.evaluation.report import write_report
from fovea.service.artifact.contract import Task
from tests.parsed_page import ParsedPage
from tests.training import stack_pixels


def make_examples(count: int, labels: int, task: Task, seed: int) -> Examples:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 16, 16, 3), generator=random, dtype=torch.uint8)
    targets = torch.randint(0, labels, (count,), generator=random)
    if task is Task.MULTILABEL:
        return Examples(pixels, (torch.rand(count, labels, generator=random) < 0.3).float())
    return Examples(pixels, targets)


def make_logits(part: Examples, labels: int, task: Task, certainty: float) -> Tensor:
    """Return logits that are correct for most images."""
    noise = torch.randn(
        len(part), 1 if task is Task.BINARY else labels, generator=torch.Generator().manual_seed(9)
    )
    if task is Task.MULTICLASS:
        return noise + certainty * torch.nn.functional.one_hot(part.targets, labels)
    return noise + certainty * (part.targets.float().view(len(part), -1) - 0.5)


def make_report(
    path: Path,
    task: Task = Task.MULTICLASS,
    labels: tuple[str, ...] = ("ant", "bee", "cow"),
    *,
    epochs: int = 4,
    certainty: float = 2.0,
    test: int = 200,
    **dataset_fields: Any,
) -> tuple[ParsedPage, Dataset, dict[str, Any]]:
    """Write a report of random logits; return the parsed page, the data set and the metadata."""
    train, validation, conformal, test_examples = (
        make_examples(count, len(labels), task, seed) for seed, count in enumerate((300, 120, 120, test))
    )
    parts = (train, validation, conformal, test_examples)
    data = Dataset(
        "my photos", labels, task, square_geometry(16), *parts, **{"unreadable_files": (), **dataset_fields}
    )
    part_logits = [
        make_logits(part, len(labels), task, certainty) for part in (validation, conformal, test_examples)
    ]
    calibration = fit_calibration(part_logits[0], validation.targets, part_logits[1], conformal.targets, task)
    part, logits = ("test", part_logits[2]) if test else ("validation", part_logits[0])
    examples_of_part = getattr(data, part)
    metadata = {
        "measured": {
            "part": part,
            "images": len(examples_of_part),
            **measure_part(logits, examples_of_part, task, calibration),
        },
        "progress": {
            "history": [
                {
                    "epoch": epoch,
                    "loss": 2 / epoch,
                    "train_accuracy": 0.5,
                    "validation_accuracy": 0.4,
                    "seconds": 30,
                }
                for epoch in range(1, epochs + 1)
            ]
        },
        "parameters": 1234567,
        "net": {"name": "cnn", "size": 16},
        "command": "fovea train --data 'a & b'",
        "commit": "c0ffee",
        "hardware": "a machine",
        "torch": "2",
        "recipe": {"epochs": epochs, "peak_lr": 0.2},
    }
    write_report(path, metadata, data, part, logits, calibration)
    return ParsedPage(path.read_text()), data, metadata


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Task.MULTICLASS, ("ant", "bee", "cow")),
        (Task.BINARY, ("cat", "dog")),
        (Task.MULTILABEL, ("sun", "sea", "sand")),
        (Task.MULTICLASS, tuple(f"label {number}" for number in range(1000))),
    ],
)
def test_report_is_complete_for_every_task(tmp_path: Path, task: Task, labels: tuple[str, ...]) -> None:
    page, data, metadata = make_report(tmp_path / "report.html", task, labels)
    assert f"{metadata['measured']['accuracy']:.2%}" in page.text
    assert f"{metadata['measured']['ece']:.4f}" in page.text
    assert ("Confusion" in page.text) is (task is not Task.MULTILABEL)
    assert all(label in page.text for label in data.labels[:200])
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert not re.search(r"https?:|src=.?//|@import|url\(", (tmp_path / "report.html").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_names_from_the_user_are_escaped(tmp_path: Path) -> None:
    labels = ("<script>alert(1)</script>", "a & 'b'", '"c"')
    unreadable = ("<img src=x onerror=alert(1)>.png: damaged",)
    page, _, _ = make_report(tmp_path / "report.html", labels=labels, unreadable_files=unreadable)
    assert not page.find_tags("script")
    assert all("onerror" not in attributes for attributes in page.find_tags("img"))
    assert all(label in page.text for label in (*labels, "fovea train --data 'a & b'"))
    assert "skipped <img src=x onerror=alert(1)>.png: damaged" in page.text


def test_confusion_matrix_counts_every_image(tmp_path: Path) -> None:
    page, data, _ = make_report(tmp_path / "report.html")
    cells = re.findall(
        r"<td style='--share:[\d.]+'(?: class=strong)?>(\d*)</td>", (tmp_path / "report.html").read_text()
    )
    assert len(cells) == 9
    assert sum(int(cell or 0) for cell in cells) == len(data.test)
    assert "Rows are true labels" in page.text


def test_mistakes_are_shown_most_confident_first(tmp_path: Path) -> None:
    page, data, _ = make_report(tmp_path / "report.html", certainty=1.0)
    sources = [attributes["src"] or "" for attributes in page.find_tags("img")]
    assert len(sources) == 24
    test_images = {image.numpy().tobytes() for image in stack_pixels(data.test.pixels)}
    for source in sources:
        picture = Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.array(picture).tobytes() in test_images
    shares = [
        float(share) for share in re.findall(r"</em> ([\d.]+)%", (tmp_path / "report.html").read_text())
    ]
    assert shares == sorted(shares, reverse=True)


def test_report_without_mistakes_or_test_images_is_written(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path / "one.html", epochs=1, certainty=50.0)
    assert "None." in page.text
    page, _, _ = make_report(tmp_path / "none.html", test=0)
    assert "validation accuracy" in page.text
    assert "no test images" in " ".join(page.text.split())


def test_curves_stay_inside_the_plot(tmp_path: Path) -> None:
    page, _, _ = make_report(tmp_path / "report.html", epochs=30)
    lines = page.find_tags("polyline")
    assert len(lines) == 5  # loss, two accuracies, two reliabilities
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in (line["points"] or "").split()]
        assert all(0 <= x <= 460 and 0 <= y <= 260 for x, y in points)
    assert [len((line["points"] or "").split()) for line in lines[:3]] == [30, 30, 30]


@pytest.mark.parametrize(
    "ends", [(0.57, 1.7), (0.53, 0.944), (1.0, 1.0), (0.0, 0.0), (0.98, 1.0), (2e-4, 3e-4)]
)
def test_ticks_are_few_and_cover_the_values(ends: tuple[float, float]) -> None:
    ticks = choose_ticks(*ends, max_value=1.0 if ends[1] <= 1 else 10.0)
    assert ticks[0] <= ends[0] + 1e-9
    assert ticks[-1] >= ends[1] - 1e-9
    assert ticks[-1] <= 1 or ends[1] > 1
    assert 3 <= len(ticks) <= 7
    steps = {f"{step:.1e}"[:3] for step in np.diff(ticks)}
    assert len(steps) == 1
    assert steps <= {"1.0", "2.0", "2.5", "5.0"}


def test_report_omits_missing_parts_and_counts_hidden_labels(tmp_path: Path) -> None:
    multilabel_page, _, _ = make_report(tmp_path / "several.html", Task.MULTILABEL)
    assert "conformal sets" not in multilabel_page.text
    large_page, _, _ = make_report(
        tmp_path / "many.html", labels=tuple(f"label {number}" for number in range(1200))
    )
    assert "and 1,000 more labels" in large_page.text


def test_long_lists_of_warnings_are_collapsed(tmp_path: Path) -> None:
    page, _, _ = make_report(
        tmp_path / "report.html", unreadable_files=tuple(f"{number}.png: bad" for number in range(500))
    )
    assert page.find_tags("details") == [{}]
    assert "and 300 more" in page.text
    page, _, _ = make_report(tmp_path / "short.html", warnings=("two images are the same",))
    assert page.find_tags("details") == [{"open": None}]
