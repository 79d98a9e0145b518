"""Choice of the versions to serve at the start: the latest valid version of each model.

A start uses the repository without the versions that were refused before. If the runners cannot load these
versions, each version is tried in a separate process. Versions that fail are refused, and the start continues
without them. A bad model does not affect other models.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from fovea.service.artifact import repository
from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.repository import ModelVersion, RefusedVersion, ServingState
from fovea.service.errors import Interrupted, ModelError, StartError, one_line
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.trial import Trials, check, is_lasting, is_of_provider
from fovea.service.runners.messages import LoadCommand, ProcessPlan
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_CHANCE: Final = 0.01
"""Probability below which flips on a few images are not considered chance. A model has at most 8 golden
images, and they must not refuse a version that was accepted before."""


def start(settings: Settings, run: Callable[[ServingState, Refusals], None]) -> None:
    """Call `run` with the versions to serve. Call it again without the versions that prevent the start.

    `run` raises `StartError` when it cannot serve the versions, and only before it serves anything. Raises
    `StartError` when no model is the cause, or with FOVEA_STRICT.
    """
    refusals = Refusals(settings.state)
    if settings.strict or settings.models.is_file():
        run(repository.scan_repository(settings.models, settings.default_model), refusals)
        return
    served = _compare(settings, find(settings, refusals), refusals)
    while True:
        try:
            run(served, refusals)
            return
        except StartError as error:
            without = _without_broken(settings, served, refusals)
            if without is None or without.versions_by_model == served.versions_by_model:
                raise
            log.error("the start is tried again without what cannot be served: %s", one_line(error))
            served = without


def find(
    settings: Settings, refusals: Refusals, failed: Mapping[ModelVersion, str] | None = None
) -> ServingState:
    """Return the versions to serve: the latest valid version of each model.

    Versions that were refused are left out. `failed` maps versions that have just failed to their reasons,
    and these versions are left out too. A problem with one model is logged and does not affect the other
    models. Raises `ModelError` when the repository cannot be read, or FOVEA_DEFAULT_MODEL names an unknown
    model.
    """
    root, named = settings.models, settings.default_model

    def reason(found: ModelVersion) -> str | None:
        return (failed or {}).get(found) or refusals.reason(found)

    shelf: dict[str | None, tuple[ModelVersion, ...]] = {}
    refused: list[RefusedVersion] = []
    names = repository.list_model_names(root)
    for name in names:
        try:
            choice = repository.choose_versions(root, name, reason)
        except ModelError as error:
            refused.append(RefusedVersion(name, "", one_line(error), is_pinned=True))
            continue
        refused += choice.refused_versions
        if choice.versions:
            shelf[name] = choice.versions
            repository.warn_about_empty_versions(choice.versions[-1])
    if named and names and named not in names:
        raise ModelError(f"FOVEA_DEFAULT_MODEL is {named!r}; there are {', '.join(names)}")
    default = named or _default_of(settings)
    known = {*shelf, *(one.name for one in refused)}
    if default and default not in known:
        refused.append(RefusedVersion(default, "", "the default model has no version in the repository yet"))
    for one in refused:
        log.error("model %s version %s is not served: %s", one.name, one.version or "?", one.reason)
    if not shelf:
        log.error("%s has no <name>/<version>/model.onnx that can be served: it is waited for", root)
    return ServingState(
        shelf, default or repository.find_single_model(known), tuple(refused), is_empty=not shelf
    )


def _default_of(settings: Settings) -> str | None:
    """Return the default model in the repository's file; None if the file is missing or not valid."""
    try:
        return repository.read_default_model(settings.models)
    except ModelError as error:
        log.error(one_line(error))
        return None


def _without_broken(settings: Settings, served: ServingState, refusals: Refusals) -> ServingState | None:
    """Try the versions that are loaded at the start, and the replacements of those that fail.

    Return None when no version fails. Raises `StartError` when no model is the cause.
    """
    trials = Trials(seconds=settings.trial_seconds, memory=settings.trial_bytes)
    good: set[ModelVersion] = set()
    failed: dict[ModelVersion, str] = {}
    while True:
        untried = [
            one
            for one in repository.select_initial_versions(served, settings.models_loaded)
            if one not in good
        ]
        if not untried:
            return served if failed else None
        for found in untried:
            try:
                trials.run(_load_of(settings, found), None, [])
            except Interrupted:
                pass
            except ModelError as error:
                if is_of_provider(error) and not found.config.provider:
                    raise
                failed[found] = one_line(error)
                refusals.refuse(found, one_line(error), lasting=is_lasting(error))
                continue
            good.add(found)
        served = find(settings, refusals, failed)


def is_broken(settings: Settings, refusals: Refusals, found: ModelVersion) -> bool:
    """Return whether a starting process cannot load a version. A broken version is also refused."""
    try:
        if fingerprint_of(found.path) != found.fingerprint:
            return True
        trials = Trials(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        trials.run(_load_of(settings, found), None, [])
    except Interrupted:
        return False
    except ModelError as error:
        if not is_of_provider(error):
            refusals.refuse(found, one_line(error), lasting=is_lasting(error))
        return True
    return False


def _compare(settings: Settings, served: ServingState, refusals: Refusals) -> ServingState:
    """Compare each version without a verdict with the version before, on the golden images of both.

    The comparison of a running service uses recent images of callers, which do not exist at the start.
    """
    if settings.swap_flips >= 1 and not settings.swap_slowdown:
        return served
    trials = Trials(seconds=settings.trial_seconds, memory=settings.trial_bytes)
    while True:
        again = False
        for found in repository.select_initial_versions(served, settings.models_loaded):
            if repository.is_pinned(found):  # the operator has chosen this version
                continue
            before = repository.find_fallback_version(settings.models, found, refusals.reason)
            if before is None or refusals.is_accepted(found):
                continue
            try:
                _compare_one(settings, trials, found, before)
            except Interrupted as error:
                log.warning("%s could not be compared with version %s: %s", found.path, before.version, error)
            except ModelError as error:
                if is_of_provider(error):
                    raise
                refusals.refuse(found, one_line(error), lasting=is_lasting(error))
                again = True
        if not again:
            return served
        served = find(settings, refusals)


def _compare_one(settings: Settings, trials: Trials, found: ModelVersion, before: ModelVersion) -> None:
    """Raise `ModelError` when a version changes more than it may, beyond chance."""
    loads = _load_of(settings, found), _load_of(settings, before)
    verdict = trials.run(*loads, [], golden=True)
    chance = _chance(verdict.images, verdict.flips, settings.swap_flips)
    if verdict.flip_rate > settings.swap_flips and chance >= _CHANCE:
        log.warning(
            f"{found.path} gives {verdict.flips} of {verdict.images} golden images another label than "
            f"version {before.version}: too few to tell whether it may be served (FOVEA_SWAP_FLIPS); it is"
        )
        verdict = replace(verdict, flips=0)
    elif not verdict.images and settings.swap_flips < 1:
        log.warning(f"{found.path} could not be compared with version {before.version}: there are no images")
    check(verdict, settings.swap_flips, settings.swap_slowdown)


def _chance(images: int, flips: int, rate: float) -> float:
    """Return the probability of at least `flips` flips in `images` images that each flip at `rate`."""
    counts = range(flips, images + 1)
    return math.fsum(
        math.comb(images, count) * rate**count * (1 - rate) ** (images - count) for count in counts
    )


def _load_of(settings: Settings, found: ModelVersion) -> LoadCommand:
    """Return the load message for a trial."""
    plan = ProcessPlan(
        provider=found.config.provider or settings.provider,
        batch_max=found.config.batch_max or settings.batch_max,
        threads=1,
        wide_threads=0,
        decode_threads=1,
        image_pixels=settings.image_pixels,
        decode_bytes=settings.decode_bytes,
        processes=1,
    )
    return LoadCommand(0, str(found.path), str(found.path), found.fingerprint, plan)
