"""`fovea classify` on the terminal, and `fovea explain`: the core without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import orjson
from prometheus_client import CollectorRegistry
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fovea.service.api.native.outcomes import render_model_name, render_outcome
from fovea.service.artifact.contract import Contract, Coverage
from fovea.service.artifact.contract_file import read_contract
from fovea.service.artifact.repository import scan_repository
from fovea.service.errors import FileError, RequestError, StartError, UnsupportedFormat
from fovea.service.explain.explainer import Explainer, Explanation
from fovea.service.explain.messages import ExplanationRequest, Method, ModelInput
from fovea.service.image_files import ImageEntry
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.boxes import Boxes
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.inference.session import read_model
from fovea.service.observability.metrics import Metrics
from fovea.service.resources.threads import expects_gpu
from fovea.service.runners.batch_messages import BoxAnswers, ImageRequest
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.catalog import ModelCatalog
from fovea.service.serving.classifier import BoxClassification, Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import (
    LabelSet,
    compute_label_set,
    find_coverage,
    find_label_index,
    is_known,
    rank_labels,
)
from fovea.service.serving.standalone import create_load, load_predictor
from fovea.service.settings import Settings, load_settings
from fovea.service.signals import delay_interrupt

_MAX_NAMED_FILES: Final = 3
"""Number of skipped files that the summary names."""


Outcome = Classification | BoxClassification | RequestError | FileError


class _HasLoadedModel(Protocol):
    @property
    def loaded_model(self) -> LoadedModel: ...


_Loaded = TypeVar("_Loaded", bound=_HasLoadedModel)


def classify_images(
    entries: Iterator[ImageEntry],
    settings: Settings,
    *,
    sources: Sequence[str],
    is_single: bool,
    model: str | None,
    top_k: int,
    coverage: float | None,
    embedding: bool = False,
    boxes: Boxes | None = None,
    as_json: bool,
) -> int:
    """Classify images one by one, and print each answer as soon as it is available.

    With `is_single`, the user named one image, and its answer is not in a list. Return 0, or 1 if any image
    got an error. The error is printed in place of the answer. Files that are not images and were not named
    are skipped, and their number is printed on stderr.

    Raises `StartError` if the models cannot be loaded, if there are no images in the `sources`, for an
    `embedding` without `as_json`, or for `boxes` with several images; `ModelNotFound` for an unknown `model`;
    `BadRequest` and `NoEmbedding` for a `coverage` or an `embedding` that the model does not have.
    """
    if embedding and not as_json:
        raise StartError("--embedding needs --json: an embedding is a list of numbers for programs")
    if boxes is not None and not is_single:
        raise StartError("--box and --boxes are for one image; name one file")
    configure_pillow()
    predictor, live_model = load_live_model(settings, model, load_predictor)
    label_set = None if coverage is None else find_coverage(live_model.contract, coverage)
    if embedding:
        live_model.require_embedding()
    printer: _Printer = (_JsonPrinter if as_json else _TextPrinter)(live_model, top_k, label_set, is_single)
    skipped_names: list[str] = []
    skipped_count = failure_count = 0
    try:
        for entry in entries:
            outcome = _classify_entry(predictor, live_model, entry, settings.body_bytes, embedding, boxes)
            if isinstance(outcome, UnsupportedFormat) and not entry.is_named:
                skipped_names = [*skipped_names, entry.name][:_MAX_NAMED_FILES]
                skipped_count += 1
                continue
            failure_count += not isinstance(outcome, Classification | BoxClassification)
            printer.show_outcome(entry.name, outcome)
    finally:  # an interrupted run must still print complete JSON
        printer.end()
    if skipped_count:
        print(f"fovea: {_describe_skipped_files(skipped_names, skipped_count)}", file=sys.stderr)
    if not printer.outcome_count and not is_single:
        raise StartError(f"there are no images in {', '.join(sources)}")
    return int(failure_count > 0)


def _describe_skipped_files(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"skipped {_format_count(count, 'file')} without an image: {', '.join(names)}{more}"


def _format_count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def explain_file(
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
    """Write the photo under its heat map to `out`, a PNG; print the label and the method, and return 0.

    Raises `StartError` if the model cannot be loaded or `out` cannot be written, `ModelNotFound`, and the
    errors of the image, the label or the method.
    """
    if out.suffix.lower() not in ("", ".png"):
        raise StartError(
            f"--out is {_printable_name(out)}, but the heat map is a PNG; end the name with .png"
        )
    settings = load_settings(**overrides)
    configure_pillow()
    _, live_model = load_live_model(settings, model, load_predictor)
    content = read_model(live_model.model_version.path, live_model.model_version.fingerprint)
    explainer = Explainer(content, live_model.contract, live_model.load.plan)
    question = ExplanationRequest(
        method=method,
        label=None if label is None else find_label_index(live_model.contract, label),
        seed=seed,
        samples=samples,
        seconds=settings.explain_seconds,
        picture=True,
    )
    model_input, explanation = _explain_with_progress(explainer, file.read_bytes(), question)
    try:
        out.write_bytes(explanation.picture)
    except OSError as error:
        raise StartError(f"cannot write {_printable_name(out)}: {error.strerror}") from None
    for warning in model_input.warnings:
        print(f"{warning.code}: {warning.text}")
    label_name = live_model.contract.labels[explanation.label]
    probability = model_input.probabilities[explanation.label]
    print(f"{label_name}  {probability:.1%}  {_describe_method(explanation)}")
    print(f"wrote {_printable_name(out)}")
    return 0


def _explain_with_progress(
    explainer: Explainer, image: bytes, question: ExplanationRequest
) -> tuple[ModelInput, Explanation]:
    model_inputs: list[ModelInput] = []
    console = Console(highlight=False, stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("masking parts of the image", total=1.0, visible=False)
        explanation = explainer.explain(
            image,
            question,
            model_inputs.append,
            lambda step, _: bar.update(task, completed=step.progress, visible=True),
        )
    return model_inputs[0], explanation


def _describe_method(explanation: Explanation) -> str:
    if explanation.method == "cam":
        return "by its class activation map"
    reason = f": {explanation.note}" if explanation.note else ""
    return f"by occlusion, {explanation.samples} masked images{reason}"


def load_live_model(
    settings: Settings,
    name: str | None,
    load_model: Callable[[LoadCommand], _Loaded],
    choose_batch_max: Callable[[Contract], int] | None = None,
) -> tuple[_Loaded, LiveModel]:
    """Load the named model, or the default model.

    `load_model` loads it, such as `load_predictor`. `choose_batch_max` replaces the default size of batches
    on a CPU, if no setting chooses another one.
    """
    serving_state = scan_repository(settings.models, settings.default_model, settings.model_name)
    catalog = ModelCatalog(settings, serving_state, Metrics(CollectorRegistry()))
    single_file = serving_state.versions_by_model.get(None)
    version = single_file[-1] if single_file else catalog.get(name)
    if isinstance(version, LiveModel):
        raise RuntimeError("nothing is loaded yet")
    load = create_load(version, settings)
    if choose_batch_max and not load.plan.batch_max and not expects_gpu(load.plan.provider):
        batch_max = choose_batch_max(read_contract(version.path))
        load = replace(load, plan=replace(load.plan, batch_max=batch_max))
    loaded = load_model(load)
    live_model = LiveModel.from_load_result(version, load, loaded.loaded_model, settings)
    catalog.add(live_model)
    catalog.check_default_model()
    catalog.get(name)  # the contract may name a single file differently from what was asked for
    return loaded, live_model


def _classify_entry(
    predictor: Predictor,
    live_model: LiveModel,
    entry: ImageEntry,
    max_bytes: int,
    embedding: bool,
    boxes: Boxes | None,
) -> Outcome:
    """Classify one image of at most `max_bytes` bytes, the size that the service accepts in a request."""
    try:
        content = entry.read(max_bytes)
    except (FileError, RequestError) as error:
        return error
    request = ImageRequest(content, include_embedding=embedding, boxes=boxes)
    answer = predictor.predict_batch([request], exclusive=True).answers[0]
    if isinstance(answer, BoxAnswers):
        return BoxClassification(live_model, boxes or (), answer)
    return answer if isinstance(answer, RequestError) else Classification(live_model, answer)


class _Printer:
    """A printer that writes each answer as soon as it is available."""

    def __init__(self, live_model: LiveModel, top_k: int, coverage: Coverage | None, is_single: bool) -> None:
        """Create a printer; with `is_single`, one file was given and its answer is not in a list."""
        self.live_model, self.top_k, self.coverage, self.is_single = live_model, top_k, coverage, is_single
        self.outcome_count = 0

    def show_outcome(self, name: str, outcome: Outcome) -> None:
        """Print one answer whole, even if the user interrupts meanwhile."""
        with delay_interrupt():
            self._print_outcome(name, outcome)
            self.outcome_count += 1
            sys.stdout.flush()

    def end(self) -> None:
        """Print the text after the last answer."""

    def _print_outcome(self, name: str, outcome: Outcome) -> None:
        raise NotImplementedError


class _JsonPrinter(_Printer):
    """A printer of JSON in the service's own format; with several files, each answer names its file."""

    def _print_outcome(self, name: str, outcome: Outcome) -> None:
        outcome_fields = (
            {"error": outcome.to_dict()}
            if isinstance(outcome, FileError)
            else render_outcome(outcome, top_k=self.top_k, coverage=self.coverage)
        )
        if self.is_single:
            model_field = (
                {}
                if isinstance(outcome, RequestError | FileError)
                else {"model": render_model_name(self.live_model)}
            )
            print(orjson.dumps({**model_field, **outcome_fields}).decode())
            return
        self._print_head()
        separator = ",\n" if self.outcome_count else "\n"
        print(separator + orjson.dumps({"file": name, **outcome_fields}).decode(), end="")

    def _print_head(self) -> None:
        if not self.outcome_count:
            head = orjson.dumps({"model": render_model_name(self.live_model)}).decode()
            print(f'{head[:-1]},"results":[', end="")

    def end(self) -> None:
        """Close the list."""
        if not self.is_single:
            with delay_interrupt():
                self._print_head()
                print("\n]}", flush=True)


class _TextPrinter(_Printer):
    """A printer of labels and bars for people."""

    def _print_outcome(self, name: str, outcome: Outcome) -> None:
        console = Console(highlight=False)
        console.print(name, style="bold", markup=False, soft_wrap=True)
        if isinstance(outcome, Classification):
            self._print_answer(console, outcome)
        elif isinstance(outcome, BoxClassification):
            _print_warnings(console, outcome.outcome.warnings)
            for box, answer in zip(outcome.boxes, outcome.outcome.answers, strict=True):
                console.print(f"  box {','.join(map(str, box))}")
                self._print_answer(console, Classification(outcome.model, answer))
        else:
            console.print(f"  {outcome.code}: {outcome}", style="red", markup=False, soft_wrap=True)

    def _print_answer(self, console: Console, outcome: Classification) -> None:
        _print_warnings(console, outcome.answer.warnings)
        if is_known(outcome) is False:
            console.print("  unlike the images that the model was trained on", style="yellow")
        console.print(_create_bar_table(outcome, self.top_k))
        if self.coverage:
            console.print(
                _format_label_set(compute_label_set(outcome, self.coverage)), markup=False, soft_wrap=True
            )


def _print_warnings(console: Console, warnings: Sequence[ImageWarning]) -> None:
    for warning in warnings:
        console.print(f"  {warning.code}: {warning.text}", style="yellow", markup=False, soft_wrap=True)


def _format_label_set(prediction_set: LabelSet) -> str:
    doubt = " (too uncertain to decide)" if prediction_set.abstain else ""
    labels = ", ".join(prediction_set.labels) or "none"
    return (
        f"  for images like the test images, the true label is among these "
        f"in {100 * prediction_set.level:g}% of cases: {labels}{doubt}"
    )


def _printable_name(path: Path) -> str:
    """Return the path as printable text; a file name need not be valid UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _create_bar_table(outcome: Classification, top_k: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(width=40)
    for prediction in rank_labels(outcome, top_k=top_k):
        bar = Bar(1.0, 0.0, prediction.probability, color="green")
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", bar)
    return table
