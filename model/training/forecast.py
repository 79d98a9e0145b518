"""The forecast of a run's duration, printed within a minute."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console

from fovea.model.training.pace import estimate_step, format_duration
from fovea.model.training.training_run import TrainingRun


class Forecast:
    """A one-time forecast of the run's duration, printed within a minute and based on the first steps.

    The training loop calls `start` before its first step and `count_step` after each step.
    """

    def __init__(self, run: TrainingRun, total: int, console: Console) -> None:
        self._run, self._total, self._console = run, total, console
        self._started_at = self._warm_at = time.monotonic()
        self._step_count = 0
        self._is_done = run.state.step >= total

    def start(self) -> None:
        """Print the forecast before the first step if a step is slow."""
        if not self._is_done:
            step_seconds = estimate_step(self._run.net, self._run.data, self._run.recipe, self._run.device)
            if step_seconds is not None and step_seconds > _FORECAST_SECONDS:
                self._print_forecast(step_seconds)
        self._started_at = time.monotonic()

    def count_step(self) -> None:
        """Count a step, and print the forecast after enough steps or enough time."""
        if self._is_done:
            return
        now = time.monotonic()
        self._step_count += 1
        if self._step_count == 1:
            self._warm_at = now  # the first step includes warm-up
            if now - self._started_at < _SLOW_STEP_SECONDS:
                return
        is_last = self._run.state.step in (self._run.batches.steps, self._total)
        if self._step_count < _FORECAST_STEPS and now - self._started_at < _FORECAST_SECONDS and not is_last:
            return
        measured_since = self._warm_at if self._step_count > 1 else self._started_at
        self._print_forecast((now - measured_since) / max(1, self._step_count - 1))

    def _print_forecast(self, step_seconds: float) -> None:
        self._is_done = True
        run = self._run
        remaining = self._total - run.state.step
        evaluation = _FORWARD_COST * len(run.data.validation) / run.recipe.batch  # in steps
        epochs = remaining / run.batches.steps
        seconds = step_seconds * (remaining + epochs * evaluation)
        hint = "; --minutes N makes it shorter" if seconds > _LONG_RUN_SECONDS else ""
        images, rate = run.batches.steps * run.recipe.batch, run.recipe.batch / step_seconds
        self._console.print(
            f"expected: {format_duration(seconds)} for {epochs:.3g} epochs of {images} images, at {rate:.0f} "
            f"images/s{hint}",
            soft_wrap=True,
        )


_FORECAST_STEPS: Final = 50
"""Number of steps after which the forecast is accurate enough."""
_FORECAST_SECONDS: Final = 10.0
"""Time after which two steps are enough for the forecast, in seconds."""
_SLOW_STEP_SECONDS: Final = 30.0
"""Duration of the first step, in seconds, from which one step is enough for the forecast."""
_FORWARD_COST: Final = 1 / 3
"""Time to evaluate an image relative to its time in a training step."""
_LONG_RUN_SECONDS: Final = 1800.0
"""Duration, in seconds, from which the forecast mentions the option that shortens a run."""
