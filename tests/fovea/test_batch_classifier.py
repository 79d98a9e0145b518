"""`fovea.BatchClassifier`: batches of other engines, here as dictionaries of arrays and pandas frames."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fovea
from fovea.batch_classifier import SPARK_TYPES, _load_model
from fovea.bulk.rows import Row, create_row
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import ROOT

IMAGES = [make_jpeg(64, 48, seed) for seed in range(4)]
ANSWER = ["path", *[field for field in Row._fields if field != "path"]]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_to_repository(build_model(), tmp_path_factory.mktemp("zoo"), "pets", "3") / "pets"


def make_column(*values: Any) -> np.ndarray[Any, Any]:
    column = np.empty(len(values), object)
    for index, value in enumerate(values):
        column[index] = value
    return column


def read_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a dictionary of columns; NaN becomes None."""
    lists = {name: [None if one != one else one for one in values] for name, values in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def expect_rows(
    model: Path, paths: list[str | None], images: list[Any], **options: Any
) -> list[dict[str, Any]]:
    """Return the rows that `Model.classify` gives, with float32 and lists."""
    results = fovea.load(model).classify(images, on_error="return", **options)
    rows = [create_row(path, result)._asdict() for path, result in zip(paths, results, strict=True)]  # type: ignore[arg-type]
    for row in rows:
        for name, value in row.items():
            if isinstance(value, tuple):
                row[name] = list(value)
            elif isinstance(value, float):
                row[name] = np.float32(value)
    return rows


def test_rows_are_those_of_the_model(pets: Path) -> None:
    classifier = fovea.BatchClassifier(pets, top_k=2, coverage=0.9)
    answer = classifier({"bytes": make_column(*IMAGES)})
    assert list(answer) == ANSWER
    expected = expect_rows(pets, [None] * 4, IMAGES, top_k=2, coverage=0.9)
    for row, expected_row in zip(read_rows(answer), expected, strict=True):
        probabilities, others = row.pop("probabilities"), row.pop("probability")
        assert probabilities == pytest.approx(expected_row.pop("probabilities"), abs=1e-6)
        assert others == pytest.approx(expected_row.pop("probability"), abs=1e-6)
        assert row == expected_row
    assert answer["probability"].dtype == answer["known_score"].dtype == np.float32


def test_other_columns_are_carried_along_and_images_are_not(pets: Path) -> None:
    ids, vectors = np.arange(4), np.ones((4, 3), np.float32)
    batch = {
        "id": ids,
        "bytes": make_column(*IMAGES),
        "vector": vectors,
        "path": make_column("a", "b", None, "d"),
    }
    answer = fovea.BatchClassifier(str(pets))(batch)
    assert list(answer) == ["id", "vector", *ANSWER]
    assert answer["id"] is ids
    assert answer["vector"] is vectors
    assert list(answer["path"]) == ["a", "b", None, "d"]


def test_paths_are_read_where_there_are_no_bytes(pets: Path, tmp_path: Path) -> None:
    good, missing = tmp_path / "good.jpg", tmp_path / "missing.jpg"
    good.write_bytes(IMAGES[0])
    answer = fovea.BatchClassifier(pets)({"path": np.array([str(good), str(missing)])})
    assert list(answer["path"]) == [str(good), str(missing)]
    assert answer["label"][0] is not None
    assert list(answer["error"]) == [None, "unreadable_file"]
    assert "No such file" in answer["message"][1]


@pytest.mark.parametrize("null", [None, float("nan"), np.float64("nan"), np.float32("nan")], ids=repr)
def test_null_becomes_a_row_with_an_error(pets: Path, null: Any) -> None:
    answer = fovea.BatchClassifier(pets)({"bytes": make_column(IMAGES[0], null, IMAGES[1])})
    first, second, third = read_rows(answer)
    assert first["label"]
    assert third["label"]
    expected = {"error": "unreadable_file", "message": "there is no image: the value is null"}
    assert second == {**dict.fromkeys(ANSWER), **expected}


def test_bad_images_and_values_become_rows_with_errors(pets: Path) -> None:
    values = [
        b"no image",
        IMAGES[0][:300],
        b"",
        7,
        {"bytes": None, "path": None},
        ["a", "b"],
        "http://x/y.jpg",
    ]
    answer = fovea.BatchClassifier(pets)({"bytes": make_column(*values, IMAGES[0])})
    assert list(answer["error"]) == [
        "unsupported_format", "bad_image", "bad_request", "bad_request",
        "unreadable_file", "bad_request", "unreadable_file", None,
    ]  # fmt: skip
    assert "int is not an image" in answer["message"][3]


def test_batch_of_nulls_needs_no_model() -> None:
    answer = fovea.BatchClassifier("/nowhere")({"bytes": make_column(None, None)})
    assert list(answer["error"]) == ["unreadable_file"] * 2


def test_empty_batch_has_all_columns() -> None:
    answer = fovea.BatchClassifier("/nowhere")({"bytes": np.empty(0, object), "id": np.empty(0, int)})
    assert list(answer) == ["id", *ANSWER]
    assert {len(values) for values in answer.values()} == {0}


def test_images_come_in_many_forms(pets: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), np.uint8)
    expected = [one.label for one in fovea.load(pets).classify(list(pixels))]
    pictures = [Image.fromarray(one) for one in pixels]
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    contents = [file.read_bytes() for file in files]
    forms: dict[str, Any] = {
        "one array": pixels,
        "arrays": make_column(*pixels),
        "pictures": make_column(*pictures),
        "paths": make_column(*files),
        "bytes": contents,
        "bytes of fixed size": np.array([content + b"\0" for content in contents]),
        "dictionaries": make_column(
            {"bytes": contents[0], "path": "zero.png"},
            {"bytes": contents[1], "path": None},
            {"bytes": None, "path": str(files[2])},
        ),
    }
    for name, column in forms.items():
        answer = fovea.BatchClassifier(pets, column="picture")({"picture": column})
        assert list(answer["label"]) == expected, name
    assert list(answer["path"]) == ["zero.png", None, str(files[2])]


def test_zeros_at_the_end_of_an_image_are_kept(pets: Path) -> None:
    """NumPy cuts them from the values of an array of bytes, and a black BMP ends with zeros."""
    buffer = BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "BMP")
    column = np.array([buffer.getvalue()])
    assert len(column[0]) < len(buffer.getvalue())
    assert list(fovea.BatchClassifier(pets)({"bytes": column})["error"]) == [None]


def test_columns_of_the_same_name_are_refused_unless_a_prefix_tells_them_apart(pets: Path) -> None:
    batch = {"bytes": make_column(*IMAGES), "label": np.array(list("abcd"))}
    with pytest.raises(ValueError, match=r"has a column label, .*prefix='predicted_'"):
        fovea.BatchClassifier(pets)(batch)
    answer = fovea.BatchClassifier(pets, prefix="predicted_")(batch)
    assert list(answer["label"]) == list("abcd")
    assert list(answer)[:4] == ["label", "path", "predicted_label", "predicted_probability"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no column bytes or path; its columns are id, size; name the column of images with column="),
        ({"column": "image"}, r"no column image; its columns are id, size$"),
    ],
    ids=["default", "named"],
)
def test_batch_without_images_names_its_columns(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fovea.BatchClassifier(**options)({"id": np.arange(2), "size": np.arange(2)})  # type: ignore[arg-type]


def test_wrong_options_are_refused(pets: Path) -> None:
    with pytest.raises(ValueError, match="top_k is -1"):
        fovea.BatchClassifier(pets, top_k=-1)
    with pytest.raises(ValueError, match="threads is 0"):
        fovea.BatchClassifier(pets, threads=0)
    with pytest.raises(fovea.RequestError, match="coverage"):
        fovea.BatchClassifier(pets, coverage=0.123)({"bytes": IMAGES})
    with pytest.raises(fovea.ModelError, match="/nowhere"):
        fovea.BatchClassifier("/nowhere")({"bytes": IMAGES})


def test_pickle_is_the_source_and_the_options(pets: Path) -> None:
    classifier = fovea.BatchClassifier(pets, column="bytes", prefix="a_", top_k=1, coverage=0.9)
    expected = classifier({"bytes": IMAGES})
    content = pickle.dumps(classifier)
    assert len(content) < 600
    restored = pickle.loads(content)  # noqa: S301 - ours
    assert repr(restored) == repr(classifier)
    assert read_rows(restored({"bytes": IMAGES})) == read_rows(expected)


def test_process_loads_the_model_once(pets: Path) -> None:
    _load_model.cache_clear()
    content = pickle.dumps(fovea.BatchClassifier(pets))
    for _ in range(3):  # as Spark does for each task
        pickle.loads(content)({"bytes": IMAGES})  # noqa: S301 - ours
    assert _load_model.cache_info().misses == 1


def test_importing_and_making_a_classifier_loads_nothing(pets: Path) -> None:
    code = (
        f"import fovea, sys; fovea.BatchClassifier({str(pets)!r}); "
        "print({'onnxruntime', 'PIL'} & {*sys.modules})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout == "set()\n"


def test_threads_share_a_classifier(pets: Path) -> None:
    classifier = fovea.BatchClassifier(pets)
    expected = read_rows(classifier({"bytes": IMAGES}))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(classifier, [{"bytes": IMAGES}] * 12))
    assert all(read_rows(answer) == expected for answer in answers)


@pytest.mark.long
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_answer_alike(pets: Path, method: str) -> None:
    classifier = fovea.BatchClassifier(pets)
    expected = read_rows(classifier({"bytes": IMAGES}))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        answers = list(pool.map(classifier, [{"bytes": IMAGES}] * 4))
    assert all(read_rows(answer) == expected for answer in answers)


def test_spark_schema_lists_the_columns_in_their_order() -> None:
    assert tuple(SPARK_TYPES) == Row._fields
    schema = fovea.BatchClassifier(prefix="p_").spark_schema
    assert schema.startswith("path string, p_label string, p_probability float, p_labels array<string>, ")
    assert re.fullmatch(r"(\w+ (string|float|int|boolean|array<(string|float)>)(, |$))+", schema)


class TestPandas:
    """Frames, as Spark's `mapInPandas` and Dask give them."""

    pd: Any = None

    @pytest.fixture(autouse=True)
    def _pandas(self) -> None:
        self.pd = pytest.importorskip("pandas", reason="this system has no pandas: pip install pandas")

    def test_frame_keeps_its_index_and_other_columns(self, pets: Path) -> None:
        frame = self.pd.DataFrame({"id": [1, 2, 3], "bytes": [IMAGES[0], None, b"x"]}, index=[7, 9, 4])
        answer = fovea.BatchClassifier(pets)(frame)
        assert list(answer.index) == [7, 9, 4]
        assert list(answer.columns) == ["id", *ANSWER]
        assert list(answer["error"].isna()) == [True, False, False]
        assert answer["width"].tolist()[0] == 64
        assert answer["width"].isna().tolist() == [False, True, True]
        assert {name: str(answer[name].dtype) for name in ("id", "probability", "known", "width")} == {
            "id": "int64", "probability": "float32", "known": "boolean", "width": "Int32",
        }  # fmt: skip

    def test_frames_are_classified_one_by_one(self, pets: Path) -> None:
        frames = iter([self.pd.DataFrame({"bytes": IMAGES[:1]}), self.pd.DataFrame({"bytes": IMAGES[1:]})])
        answers = fovea.BatchClassifier(pets).map_in_pandas(frames)
        first = next(answers)
        assert len(next(frames)) == 3  # the second frame has not been read yet
        expected = fovea.load(pets).classify(IMAGES[0])
        assert (len(first), first["label"][0]) == (1, expected.label)

    def test_all_kinds_of_nulls(self, pets: Path) -> None:
        column = self.pd.Series([self.pd.NA, self.pd.NaT, None, float("nan")], dtype=object)
        answer = fovea.BatchClassifier(pets)(self.pd.DataFrame({"bytes": column, "path": column}))
        assert list(answer["error"]) == ["unreadable_file"] * 4
        assert answer["path"].isna().all()

    def test_empty_frame(self) -> None:
        answer = fovea.BatchClassifier("/nowhere")(self.pd.DataFrame({"bytes": [], "id": []}))
        assert list(answer.columns) == ["id", *ANSWER]
        assert len(answer) == 0
