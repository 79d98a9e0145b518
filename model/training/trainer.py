"""The training loop: SGD with Nesterov momentum and a one-cycle schedule, reproducible by seed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fovea.model.data.dataset import Dataset
from fovea.model.evaluation.evaluate import choose_device, to_device
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import RESUME_FILE, Checkpoint, CheckpointError
from fovea.model.recipe import Recipe
from fovea.model.training.distillation import compute_teacher_logits
from fovea.model.training.forecast import Forecast
from fovea.model.training.training_run import SUMS_KEY, InitialState, TrainingRun, TrainState
from fovea.service.artifact.geometry_upgrade import read_geometry, to_plain_geometry


def train_net(
    data: Dataset,
    recipe: Recipe,
    out: Path,
    initial_state: InitialState,
    *,
    resume: bool,
    console: Console,
    on_epoch: Callable[[dict[str, float]], None] = lambda entry: None,
) -> Checkpoint | None:
    """Train a network on `data` and write checkpoints to `out`; call `on_epoch` with each epoch's figures.

    The call must be on the main thread, because Python sets signal handlers only there. `on_epoch` is called
    on the same thread, after the epoch's checkpoint is written.

    Returns the trained weights, or None if Ctrl-C stopped the run. Then `out` holds the current weights, and
    `resume=True` with the same data and recipe continues from that step. After a kill, `resume=True`
    continues from the end of the last complete epoch. Raises `CheckpointError` if `out` holds another run.
    """
    require_unused_folder(out, resume)
    teacher_logits = None
    if initial_state.teachers:
        teachers = [to_device(teacher, choose_device()) for teacher in initial_state.teachers]
        teacher_logits = compute_teacher_logits(
            teachers, initial_state.net.config, data, recipe, out, console
        )
    with TrainingRun(data, recipe, initial_state, teacher_logits) as run:
        if resume:
            _restore_run(run, out, console)
        state, steps = run.state, run.batches.steps
        total = recipe.epochs * steps
        forecast = Forecast(run, total, console)
        with _catch_interrupt() as is_interrupted, _create_progress_bar(console) as bar:
            forecast.start()
            task_id = bar.add_task("", total=total, completed=state.step, **_progress_fields())
            while state.step < total:
                run.step()
                forecast.count_step()
                if state.step % _UPDATE_STEPS == 0 or state.step == total:
                    bar.update(task_id, completed=state.step, **_format_progress(run))
                if state.step % steps == 0:
                    # The order matters: `end_epoch` extends the history that `save` stores, and the caller's
                    # `on_epoch`, which may raise, comes when the epoch is safe on the disk.
                    console.print(run.end_epoch())
                    run.save(out)
                    on_epoch(state.history[-1])
                if is_interrupted():  # set by the signal handler at any time, acted on only between steps
                    run.save(out)
                    console.print(f"stopped at step {state.step}; --resume continues from there")
                    return None
        return run.save(out)


_UPDATE_STEPS: Final = 10
"""Steps between progress bar updates; reading figures from a GPU stalls it."""


def _restore_run(run: TrainingRun, out: Path, console: Console) -> None:
    """Restore the state of the run in `out`.

    Raises `CheckpointError` if `out` holds a different run.
    """
    if not (out / RESUME_FILE).exists():
        console.print(f"{out} holds no run to resume; a new run starts", soft_wrap=True)
        return
    previous_run = checkpoint.load_checkpoint(out, RESUME_FILE)
    for key in ("net", "labels", "geometry", "recipe", "data", "start"):
        previous_value, current_value = previous_run.metadata.get(key), run.metadata[key]
        if key == "recipe" and previous_value is not None:
            previous_value = {**asdict(Recipe()), **previous_value}  # older runs do not have all fields
        if key == "geometry" and previous_value is not None:
            previous_value = to_plain_geometry(read_geometry(previous_value, key))
        if previous_value != current_value:
            raise CheckpointError(
                f"{out} holds a run with another {key}: "
                f"{_describe_difference(previous_value, current_value)}; --resume needs the same options and "
                "data, a new run needs another --out"
            )
    # `run.net` is loaded in place: the optimizer refers to its parameters.
    run.net.load_state_dict({key: previous_run.tensors[key] for key in run.net.state_dict()})
    checkpoint.restore_momentum(run.optimizer, previous_run.tensors)
    run.epoch_sums.copy_(previous_run.tensors[SUMS_KEY])
    run.state = TrainState(**previous_run.metadata["progress"])


def require_unused_folder(out: Path, resume: bool) -> None:
    """Raise `CheckpointError` if `out` holds a run and `resume` is false."""
    if not resume and (out / RESUME_FILE).exists():
        raise CheckpointError(f"{out} holds a run already; pass --resume to continue it, or another --out")


def _describe_difference(previous: Any, current: Any) -> str:
    if not isinstance(previous, dict):
        return f"{previous}, not {current}"
    keys = dict.fromkeys([*current, *previous])
    return ", ".join(
        f"{key} {previous.get(key)}, not {current.get(key)}"
        for key in keys
        if previous.get(key) != current.get(key)
    )


@contextmanager
def _catch_interrupt() -> Iterator[Any]:
    """Let Ctrl-C stop the run between two steps; a second Ctrl-C stops it at once.

    Yields a function that returns whether Ctrl-C was pressed.
    """
    requested = False

    # Python calls the handler on the main thread, between two bytecodes of a step: it may only set the flag.
    # The previous handler returns at once, so that a second Ctrl-C raises `KeyboardInterrupt`.
    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)


def _create_progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s  loss {task.fields[loss]}  train {task.fields[train]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def _format_progress(run: TrainingRun) -> dict[str, Any]:
    """Return the progress bar's fields for the current epoch."""
    state = run.state
    loss_sum, correct_count, image_count = run.epoch_sums.tolist()
    return _progress_fields(
        epoch=f"{(state.step - 1) // run.batches.steps + 1}/{run.recipe.epochs}",
        rate=f"{image_count / max(state.seconds, 1e-9):.0f}",
        loss=f"{loss_sum / image_count:.3f}",
        train=f"{correct_count / image_count:.1%}",
    )


def _progress_fields(epoch: str = "-", rate: str = "-", loss: str = "-", train: str = "-") -> dict[str, Any]:
    return {"epoch": epoch, "rate": rate, "loss": loss, "train": train}
