"""`fovea classify` and `fovea explain`: the core without a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from service import threads
from service.api.classify import Wanted, model_name, render
from service.classifier import Classification, LabelSet, coverage_of, label_set, place_of, plan_of, rank
from service.engine import read_model
from service.errors import RequestError, StartError
from service.explain import Explainer, Explanation, Method, Question, Seen
from service.images import settle_pillow
from service.inference import Model
from service.layout import find
from service.memory import DecodeMemory
from service.messages import Load
from service.metrics import Metrics
from service.repository import LiveModel, Repository
from service.settings import Settings, load_settings

Outcome = tuple[Path, Classification | RequestError]


def classify(
    files: Sequence[Path],
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    as_json: bool,
    **overrides: Any,
) -> int:
    """Classify `files` and print the answers; return 0, or 1 when any of them got an error.

    Raises `StartError` when the models cannot be loaded, `ModelNotFound` for an unknown `model`, and
    `BadRequest` for a `coverage` that it has not stored.
    """
    settings = load_settings(**overrides)
    settle_pillow()
    ours, live = _load(settings, model)
    wanted = Wanted(top_k, coverage=None if coverage is None else coverage_of(live.contract, coverage))
    outcomes = [(path, _outcome(ours, live, path)) for path in files]
    if as_json:
        print(orjson.dumps(_reply(outcomes, wanted)).decode())
    else:
        _show(outcomes, wanted)
    return int(any(isinstance(outcome, RequestError) for _, outcome in outcomes))


def explain(
    file: Path,
    out: Path,
    *,
    model: str | None,
    label: str | None,
    method: Method,
    seed: int,
    samples: int,
    **overrides: Any,
) -> int:
    """Write the photo under its heat map to `out`, a PNG, and say what it shows; return 0.

    Raises `StartError` when the model cannot be loaded or `out` not be written, `ModelNotFound`, and what is
    wrong with the image, the label or the method.
    """
    if out.suffix.lower() not in ("", ".png"):
        raise StartError(f"the picture is a PNG, and is not called {_name(out)}")
    settings = load_settings(**overrides)
    settle_pillow()
    _, live = _load(settings, model)
    content = read_model(live.found.path, live.found.stamp)
    explainer = Explainer(content, live.contract, live.load.plan)
    question = Question(
        method=method,
        label=None if label is None else place_of(live.contract, label),
        seed=seed,
        samples=samples,
        seconds=settings.explain_seconds,
        picture=True,
    )
    said: list[Seen] = []
    console = Console(highlight=False, stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("hiding places", total=1.0, visible=False)
        made = explainer.explain(
            file.read_bytes(),
            question,
            said.append,
            lambda step, _: bar.update(task, completed=step.progress, visible=True),
        )
    try:
        out.write_bytes(made.picture)
    except OSError as error:
        raise StartError(f"cannot write {_name(out)}: {error.strerror}") from None
    for warning in said[0].warnings:
        print(f"{warning.code}: {warning.text}")
    print(f"{live.contract.labels[made.label]}  {said[0].probabilities[made.label]:.1%}  {_how(made)}")
    print(f"wrote {_name(out)}")
    return 0


def _how(made: Explanation) -> str:
    if made.method == "cam":
        return "by its class activation map"
    why = f": {made.note}" if made.note else ""
    return f"by occlusion, {made.samples} masked images{why}"


def _load(settings: Settings, name: str | None) -> tuple[Model, LiveModel]:
    """The model that is asked for, or the default one."""
    served = find(settings.models, settings.default_model)
    repository = Repository(settings, served, Metrics(CollectorRegistry()))
    found = repository.shelf[None][-1] if None in repository.shelf else repository.get(name)
    if isinstance(found, LiveModel):
        raise RuntimeError("nothing is loaded yet")
    plan = plan_of(settings, threads.plan(settings, threads.available_cpus()), found.config)
    load = Load(0, str(found.path), str(found.path), found.stamp, plan)
    model = Model.of(load, DecodeMemory(plan.decode_bytes))
    live = LiveModel.of(found, load, model.loaded, settings)
    repository.add(live)
    repository.check_single()
    repository.get(name)  # a single file may be called otherwise
    return model, live


def _outcome(model: Model, live: LiveModel, path: Path) -> Classification | RequestError:
    answer = model.answer([path.read_bytes()], alone=True).answers[0]
    return answer if isinstance(answer, RequestError) else Classification(live, answer)


def _reply(outcomes: Sequence[Outcome], wanted: Wanted) -> dict[str, Any]:
    """The service's answer to the same images; with several, each says which file it is."""
    parts = [render(outcome, wanted) for _, outcome in outcomes]
    names = [model_name(outcome.model) for _, outcome in outcomes if isinstance(outcome, Classification)]
    reply: dict[str, Any] = {"model": names[0]} if names else {}
    if len(parts) == 1:
        return {**reply, **parts[0]}
    files = [{"file": _name(path)} for path, _ in outcomes]
    return {**reply, "results": [{**file, **part} for file, part in zip(files, parts, strict=True)]}


def _show(outcomes: Sequence[Outcome], wanted: Wanted) -> None:
    console = Console(highlight=False)
    for path, outcome in outcomes:
        console.print(_name(path), style="bold", markup=False, soft_wrap=True)
        if isinstance(outcome, RequestError):
            console.print(f"  {outcome.code}: {outcome}", style="red", markup=False, soft_wrap=True)
        else:
            for warning in outcome.answer.warnings:
                line = f"  {warning.code}: {warning.text}"
                console.print(line, style="yellow", markup=False, soft_wrap=True)
            console.print(_bars(outcome, wanted.top_k))
            if wanted.coverage:
                console.print(_set(label_set(outcome, wanted.coverage)), markup=False, soft_wrap=True)


def _set(found: LabelSet) -> str:
    doubt = " (too little to go by)" if found.abstain else ""
    return f"  {100 * found.level:g}% sure to be among: {', '.join(found.labels) or 'none'}{doubt}"


def _name(path: Path) -> str:
    """As it can be printed: a file's name need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _bars(outcome: Classification, top_k: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(width=40)
    for prediction in rank(outcome, top_k=top_k):
        bar = Bar(1.0, 0.0, prediction.probability, color="green")
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", bar)
    return table
