"""The commands `fovea classify` and `fovea explain`, which run the core without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fovea.service.api.native.classify import Wanted, model_name, render
from fovea.service.artifact.repository import scan_repository
from fovea.service.errors import BodyTooLarge, RequestError, StartError, UnsupportedFormat, one_line
from fovea.service.explain.explainer import Explainer, Explanation, ExplanationRequest, Method, SeenInput
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import read_model
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.observability.metrics import Metrics
from fovea.service.resources import threads
from fovea.service.runners.messages import LoadCommand
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.classifier import (
    Classification,
    LabelSet,
    compute_label_set,
    create_plan,
    find_coverage,
    find_label_index,
    rank_labels,
)
from fovea.service.serving.registry import LiveModel, ModelRegistry
from fovea.service.settings import Settings, load_settings
from fovea.service.signals import interrupt_after

_SYSTEM_NAMES: Final = frozenset(
    {
        "__MACOSX",
        "@eaDir",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "desktop.ini",
    }
)
"""Names of files and folders that operating systems create for themselves."""

_NAMED: Final = 3
"""Number of skipped files that the summary names."""


@dataclass(frozen=True)
class FileFault:
    """An error for a file that cannot be read.

    It is not a `RequestError` because there is no request.
    """

    message: str

    code = "unreadable_file"

    def to_dict(self) -> dict[str, str]:
        """Return the error in the JSON form of the service."""
        return {"code": self.code, "message": self.message}

    def __str__(self) -> str:
        return self.message


Outcome = Classification | RequestError | FileFault


def classify(
    files: Sequence[Path],
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    as_json: bool,
    **overrides: Any,
) -> int:
    """Classify files and all images below folders, and print each answer as soon as it is available.

    Return 0, or 1 if any file got an error. The error is printed in place of the answer. Files in folders
    that are not images are skipped, and their number is printed on stderr.

    Raises `StartError` if the models cannot be loaded or there are no images, `ModelNotFound` for an unknown
    `model`, and `BadRequest` for a `coverage` that the model does not have.
    """
    settings = load_settings(**overrides)
    configure_pillow()
    ours, live = _load(settings, model)
    wanted = Wanted(top_k, coverage=None if coverage is None else find_coverage(live.contract, coverage))
    single = len(files) == 1 and not files[0].is_dir()
    printer: _Printer = (_JsonPrinter if as_json else _TextPrinter)(live, wanted, single)
    left_out: list[Path] = []
    failed = 0
    try:
        for path, is_named in _expanded(files):
            outcome = _outcome(ours, live, path, settings.body_bytes)
            if isinstance(outcome, UnsupportedFormat) and not is_named:
                left_out.append(path)
                continue
            failed += not isinstance(outcome, Classification)
            printer.show(path, outcome)
    finally:  # an interrupted run must still print complete JSON
        printer.end()
    if left_out:
        names = ", ".join(_name(path) for path in left_out[:_NAMED])
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        print(
            f"fovea: left out {_count(len(left_out), 'file')} that no image is in: {names}{more}",
            file=sys.stderr,
        )
    if not printer.count and not single:
        raise StartError(f"there are no images in {', '.join(map(_name, files))}")
    return int(failed > 0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _expanded(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the files, and the files below folders in the order of their names.

    Each file comes with a flag that says if it was named on the command line.
    """
    for path in paths:
        if path.is_dir():
            for below in _below(path):
                yield below, False
        else:
            yield path, True


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder except hidden files and those that systems create for themselves.

    Links to folders are not followed. A folder that cannot be listed is yielded itself.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in _SYSTEM_NAMES:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(folder / entry.name)
        elif not entry.is_dir():
            yield folder / entry.name


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
    """Write the photo under its heat map to `out`, a PNG; print the label and the method, and return 0.

    Raises `StartError` if the model cannot be loaded or `out` cannot be written, `ModelNotFound`, and the
    errors of the image, the label or the method.
    """
    if out.suffix.lower() not in ("", ".png"):
        raise StartError(f"the picture is a PNG, and is not called {_name(out)}")
    settings = load_settings(**overrides)
    configure_pillow()
    _, live = _load(settings, model)
    content = read_model(live.model_version.path, live.model_version.fingerprint)
    explainer = Explainer(content, live.contract, live.load.plan)
    question = ExplanationRequest(
        method=method,
        label=None if label is None else find_label_index(live.contract, label),
        seed=seed,
        samples=samples,
        seconds=settings.explain_seconds,
        picture=True,
    )
    said: list[SeenInput] = []
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


def _load(settings: Settings, name: str | None) -> tuple[Predictor, LiveModel]:
    """Load the named model, or the default model."""
    served = scan_repository(settings.models, settings.default_model)
    repository = ModelRegistry(settings, served, Metrics(CollectorRegistry()))
    found = (
        repository.versions_by_model[None][-1]
        if None in repository.versions_by_model
        else repository.get(name)
    )
    if isinstance(found, LiveModel):
        raise RuntimeError("nothing is loaded yet")
    plan = create_plan(settings, threads.plan_threads(settings, threads.available_cpus()), found.config)
    load = LoadCommand(0, str(found.path), str(found.path), found.fingerprint, plan)
    model = Predictor.from_load(load, DecodeMemory(plan.decode_bytes))
    live = LiveModel.from_load_result(found, load, model.loaded_model, settings)
    repository.add(live)
    repository.check_default_model()
    repository.get(name)  # the contract may name a single file differently from what was asked for
    return model, live


def _outcome(model: Predictor, live: LiveModel, path: Path, limit: int) -> Outcome:
    """Classify one file of at most `limit` bytes, the size that the service accepts in a request."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        return FileFault(f"the file cannot be read: {error.strerror or one_line(error)}")
    if len(content) > limit:
        return BodyTooLarge(f"the file has more than {limit} bytes (FOVEA_BODY_BYTES)")
    answer = model.predict_batch([content], exclusive=True).answers[0]
    return answer if isinstance(answer, RequestError) else Classification(live, answer)


class _Printer:
    """A printer that writes each answer as soon as it is available."""

    def __init__(self, live: LiveModel, wanted: Wanted, single: bool) -> None:
        """Create a printer; `single` means that one file was given, so that its answer is not in a list."""
        self.live, self.wanted, self.single = live, wanted, single
        self.count = 0

    def show(self, path: Path, outcome: Outcome) -> None:
        """Print one answer whole, even if the user interrupts meanwhile."""
        with interrupt_after():
            self._print(path, outcome)
            self.count += 1
            sys.stdout.flush()

    def end(self) -> None:
        """Print the text after the last answer."""

    def _print(self, path: Path, outcome: Outcome) -> None:
        raise NotImplementedError


class _JsonPrinter(_Printer):
    """A printer of JSON in the service's own format; with several files, each answer names its file."""

    def _print(self, path: Path, outcome: Outcome) -> None:
        part = (
            {"error": outcome.to_dict()} if isinstance(outcome, FileFault) else render(outcome, self.wanted)
        )
        if self.single:
            named = {"model": model_name(self.live)} if isinstance(outcome, Classification) else {}
            print(orjson.dumps({**named, **part}).decode())
            return
        self._begin()
        separator = ",\n" if self.count else "\n"
        print(separator + orjson.dumps({"file": _name(path), **part}).decode(), end="")

    def _begin(self) -> None:
        if not self.count:
            head = orjson.dumps({"model": model_name(self.live)}).decode()
            print(f'{head[:-1]},"results":[', end="")

    def end(self) -> None:
        """Close the list."""
        if not self.single:
            with interrupt_after():
                self._begin()
                print("\n]}", flush=True)


class _TextPrinter(_Printer):
    """A printer of labels and bars for people."""

    def _print(self, path: Path, outcome: Outcome) -> None:
        console = Console(highlight=False)
        console.print(_name(path), style="bold", markup=False, soft_wrap=True)
        if isinstance(outcome, Classification):
            for warning in outcome.answer.warnings:
                line = f"  {warning.code}: {warning.text}"
                console.print(line, style="yellow", markup=False, soft_wrap=True)
            console.print(_bars(outcome, self.wanted.top_k))
            if self.wanted.coverage:
                console.print(
                    _set(compute_label_set(outcome, self.wanted.coverage)), markup=False, soft_wrap=True
                )
        else:
            console.print(f"  {outcome.code}: {outcome}", style="red", markup=False, soft_wrap=True)


def _set(found: LabelSet) -> str:
    doubt = " (too little to go by)" if found.abstain else ""
    return f"  {100 * found.level:g}% sure to be among: {', '.join(found.labels) or 'none'}{doubt}"


def _name(path: Path) -> str:
    """Return the path as printable text; a file name need not be valid UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _bars(outcome: Classification, top_k: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(width=40)
    for prediction in rank_labels(outcome, top_k=top_k):
        bar = Bar(1.0, 0.0, prediction.probability, color="green")
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", bar)
    return table
