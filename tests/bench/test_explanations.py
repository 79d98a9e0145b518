"""The checks of `make explanations` find one mistake in each made-up answer."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.bench.caller import Response
from fovea.bench.explanations import ExplanationResults
from fovea.bench.questions import (
    Colour,
    LeaveMoment,
    Question,
    QuestionKind,
    encode_padded_png,
    find_colours,
    find_mistake,
    plan_rounds,
)
from tests.pictures import encode_image

GREEN = (10, 200, 30)
RED = (200, 10, 30)
QUESTION = Question(QuestionKind.CAM, GREEN, (40, 30), label="ship")
OCCLUSION = replace(QUESTION, kind=QuestionKind.OCCLUSION, samples=32)
LATE = replace(QUESTION, deadline=0.5)


def make_result(colour: Colour = GREEN, size: tuple[int, int] = (40, 30), **other: Any) -> dict[str, Any]:
    png = base64.b64encode(encode_image(Image.new("RGB", (32, 32), colour), "PNG")).decode()
    return {
        "label": "ship",
        "method": "cam",
        "samples": 0,
        "image": {"format": "PNG", "width": size[0], "height": size[1]},
        "what_the_model_saw": {"png": png},
        **other,
    }


def make_answer(content: Any, status: int = 200) -> Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Response(status, b"HTTP/1.1 200 OK\r\n\r\n", body)


def join_lines(*content: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in content)


@pytest.mark.parametrize(
    ("question", "response"),
    [
        (QUESTION, make_answer(make_result())),
        (OCCLUSION, make_answer(make_result(method="occlusion", samples=32))),
        (
            replace(QUESTION, response_format="png"),
            make_answer(encode_image(Image.new("RGB", (40, 30)), "PNG")),
        ),
        (
            replace(QUESTION, response_format="lines"),
            make_answer(join_lines(make_result(), {"result": make_result()})),
        ),
        (
            replace(LATE, response_format="lines"),
            make_answer(join_lines({"error": {"code": "deadline_exceeded"}})),
        ),
        (LATE, make_answer({}, 504)),
    ],
)
def test_right_answers_are_accepted(question: Question, response: Response) -> None:
    assert find_mistake(question, response, 1.0, {}) == ""


@pytest.mark.parametrize(
    ("question", "response", "message"),
    [
        (QUESTION, make_answer(make_result(RED)), "the model saw [(200, 10, 30)]"),
        (QUESTION, make_answer(make_result(size=(30, 40))), "an image of (30, 40), not (40, 30)"),
        (QUESTION, make_answer(make_result(label="frog")), "label 'frog', not 'ship'"),
        (QUESTION, make_answer(make_result(method="occlusion", samples=16)), "method occlusion"),
        (OCCLUSION, make_answer(make_result(method="occlusion", samples=16)), "16 samples, not 32"),
        (QUESTION, make_answer({"model": {}}), "cannot be read"),
        (QUESTION, make_answer(b""), "cannot be read"),
        (replace(QUESTION, response_format="png"), make_answer(b""), "cannot be read"),
        (
            replace(QUESTION, response_format="png"),
            make_answer(encode_image(Image.new("RGB", (41, 30)), "PNG")),
            "a painted picture of (41, 30)",
        ),
        (
            replace(QUESTION, response_format="lines"),
            make_answer(join_lines(make_result(RED), {"result": make_result()})),
            "saw [(200",
        ),
        (
            replace(QUESTION, response_format="lines"),
            make_answer(join_lines(make_result(), {"result": make_result(RED)})),
            "saw [(200",
        ),
        (
            replace(QUESTION, response_format="lines"),
            make_answer(join_lines(make_result())),
            "the last line is",
        ),
        (QUESTION, make_answer({"error": {"code": "bad_image"}}, 422), "422"),
        (QUESTION, make_answer({}, 500), "500"),
        (QUESTION, make_answer({}, 504), "504 without a deadline"),
        (replace(LATE, deadline=1.5), make_answer({}, 504), "504 0.500 s early"),
    ],
)
def test_wrong_answers_are_found(question: Question, response: Response, message: str) -> None:
    assert message in find_mistake(question, response, 1.0, {})


@pytest.mark.parametrize(
    ("difference", "shape", "message"),
    [(0.0, (4, 8, 8), ""), (0.01, (4, 8, 8), "differ"), (0.0, (4, 8, 9), "maps of")],
)
def test_maps_of_another_picture_are_found(difference: float, shape: tuple[int, ...], message: str) -> None:
    expected_maps = np.zeros((4, 8, 8), np.float32)
    content = BytesIO()
    np.save(content, np.full(shape, difference, np.float32))
    mistake = find_mistake(
        replace(QUESTION, kind=QuestionKind.MAPS),
        make_answer(content.getvalue()),
        1.0,
        {GREEN: expected_maps},
    )
    assert message in mistake
    assert bool(mistake) is bool(message)


def test_run_with_a_wrong_answer_fails() -> None:
    results = ExplanationResults()
    results.questions["cam"] = 100
    results.right_answers["cam"] = 99
    assert results.failures == []
    results.add_mistake(QUESTION, "the model saw red")
    assert results.failures == ["cam, json, colour (10, 200, 30): the model saw red"]


def test_run_with_refused_or_unanswered_questions_fails() -> None:
    results = ExplanationResults(refusals=6)
    results.questions["cam"] = 100
    assert results.failures == ["6 of 100 questions got 503; at most 5%", "no cam was answered"]


def test_padded_picture_has_one_colour_and_its_size() -> None:
    png = encode_padded_png((40, 30), GREEN, 100_000)
    assert 100_000 <= len(png) < 101_000
    assert find_colours(png) == {GREEN}
    with Image.open(BytesIO(png)) as image:
        assert image.size == (40, 30)


def test_plan_has_all_questions_and_depends_on_its_seed() -> None:
    rounds = plan_rounds(1000, 20, ["ship", "frog"], 1)
    questions = [question for round_questions in rounds for question in round_questions[1:]]
    kinds = [question.kind for question in questions]
    assert (
        kinds.count(QuestionKind.CAM),
        kinds.count(QuestionKind.OCCLUSION),
        kinds.count(QuestionKind.MAPS),
    ) == (1000, 20, 50)
    assert all(
        round_questions[0].leave_moment is LeaveMoment.WAITING and round_questions[0].padding > 1 << 20
        for round_questions in rounds
    )
    assert {question.leave_moment for question in questions} == set(LeaveMoment)
    assert rounds == plan_rounds(1000, 20, ["ship", "frog"], 1)
    assert rounds != plan_rounds(1000, 20, ["ship", "frog"], 2)
