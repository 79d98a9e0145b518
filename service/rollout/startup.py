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
from fovea.service.errors import Interrupted, ModelError, StartError, to_one_line
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.trial import ShadowTests, check_result, is_lasting, is_provider_error
from fovea.service.runners.load_messages import LoadCommand, ProcessPlan
from fovea.service.serving.process_plan import find_engine_cache
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_SIGNIFICANCE_LEVEL: Final = 0.01
"""Probability below which flips on a few images are not considered chance. A model has at most 8 golden
images, which are too few to refuse a version that was accepted before."""


def start_serving(settings: Settings, run: Callable[[ServingState, Refusals], None]) -> None:
    """Call `run` with the versions to serve. Call it again without the versions that prevent the start.

    `run` is called in the calling thread, blocks until the service ends, and may be called again only because
    it raises `StartError` before it serves anything. This function raises `StartError` when no model is the
    cause, or with FOVEA_STRICT.
    """
    refusals = Refusals(settings.state)
    if settings.strict or settings.models.is_file():
        state = repository.scan_repository(settings.models, settings.default_model, settings.model_name)
        run(state, refusals)
        return
    state = _compare_versions(settings, find_serving_state(settings, refusals), refusals)
    while True:
        try:
            run(state, refusals)
            return
        except StartError as error:
            reduced_state = _exclude_broken(settings, state, refusals)
            if reduced_state is None or reduced_state.versions_by_model == state.versions_by_model:
                raise
            log.error("starting again without the versions that cannot be served: %s", to_one_line(error))
            state = reduced_state


def find_serving_state(
    settings: Settings, refusals: Refusals, failure_reasons: Mapping[ModelVersion, str] | None = None
) -> ServingState:
    """Return the versions to serve as `choose_serving_state` does, and log the problems with each model."""
    state = choose_serving_state(settings, refusals, failure_reasons)
    for versions in state.versions_by_model.values():
        repository.warn_about_empty_versions(versions[-1])
    for one in state.refused_versions:
        log.error("model %s version %s is not served: %s", one.name, one.version or "?", one.reason)
    if state.is_empty:
        log.error(
            "%s has no <name>/<version>/model.onnx that can be served yet; waiting for one", settings.models
        )
    return state


def choose_serving_state(
    settings: Settings, refusals: Refusals, failure_reasons: Mapping[ModelVersion, str] | None = None
) -> ServingState:
    """Return the versions to serve: the latest valid version of each model.

    Versions that were refused are left out. `failure_reasons` maps versions that have just failed to their
    reasons, and these versions are left out too. A problem with one model does not affect the other models.
    Raises `ModelError` when the repository cannot be read, or FOVEA_DEFAULT_MODEL names an unknown model.
    """
    root, configured_default = settings.models, settings.default_model

    def find_reason(version: ModelVersion) -> str | None:
        return (failure_reasons or {}).get(version) or refusals.find_reason(version)

    versions_by_model: dict[str | None, tuple[ModelVersion, ...]] = {}
    refused_versions: list[RefusedVersion] = []
    names = repository.list_model_names(root, settings.model_name)
    for name in names:
        try:
            choice = repository.choose_versions(root, name, find_reason)
        except ModelError as error:
            refused_versions.append(RefusedVersion(name, "", to_one_line(error), is_pinned=True))
            continue
        refused_versions += choice.refused_versions
        if choice.versions:
            versions_by_model[name] = choice.versions
    if configured_default and names and configured_default not in names:
        raise ModelError(f"FOVEA_DEFAULT_MODEL is {configured_default!r}; there are {', '.join(names)}")
    default = configured_default or _read_default(settings)
    known_names = {*versions_by_model, *(one.name for one in refused_versions)}
    if default and default not in known_names:
        refused_versions.append(
            RefusedVersion(default, "", "the default model has no version in the repository yet")
        )
    return ServingState(
        versions_by_model,
        default or repository.find_single_model(known_names),
        tuple(refused_versions),
        is_empty=not versions_by_model,
    )


def _read_default(settings: Settings) -> str | None:
    """Return the default model in the repository's file; None if the file is missing or not valid."""
    try:
        return repository.read_default_model(settings.models)
    except ModelError as error:
        log.error(to_one_line(error))
        return None


def _exclude_broken(settings: Settings, state: ServingState, refusals: Refusals) -> ServingState | None:
    """Try the versions that are loaded at the start, and the replacements of those that fail.

    Return None when no version fails. Raises `StartError` when no model is the cause.
    """
    shadow_tests = ShadowTests(seconds=settings.trial_seconds, memory=settings.trial_bytes)
    valid_versions: set[ModelVersion] = set()
    failure_reasons: dict[ModelVersion, str] = {}
    while True:
        untested_versions = [
            one
            for one in repository.select_initial_versions(state, settings.models_loaded)
            if one not in valid_versions
        ]
        if not untested_versions:
            return state if failure_reasons else None
        for version in untested_versions:
            try:
                shadow_tests.run(_create_load(settings, version), None, [])
            except Interrupted:
                pass  # nothing is known about the file: count it as valid
            except ModelError as error:
                if is_provider_error(error) and not version.config.provider:
                    raise
                failure_reasons[version] = to_one_line(error)
                refusals.refuse(version, to_one_line(error), lasting=is_lasting(error))
                continue
            valid_versions.add(version)
        state = find_serving_state(settings, refusals, failure_reasons)


def is_broken(settings: Settings, refusals: Refusals, version: ModelVersion) -> bool:
    """Return whether a starting process cannot load a version. A broken version is also refused.

    The supervisor calls this in a thread.
    """
    try:
        if fingerprint_of(version.path) != version.fingerprint:
            return True
        shadow_tests = ShadowTests(seconds=settings.trial_seconds, memory=settings.trial_bytes)
        shadow_tests.run(_create_load(settings, version), None, [])
    except Interrupted:
        return False
    except ModelError as error:
        if not is_provider_error(error):
            refusals.refuse(version, to_one_line(error), lasting=is_lasting(error))
        return True
    return False


def _compare_versions(settings: Settings, state: ServingState, refusals: Refusals) -> ServingState:
    """Compare each version without a verdict with the version before, on the golden images of both.

    The comparison of a running service uses recent images of callers, which do not exist at the start.
    """
    if settings.swap_flips >= 1 and not settings.swap_slowdown:
        return state
    shadow_tests = ShadowTests(seconds=settings.trial_seconds, memory=settings.trial_bytes)
    while True:
        has_refused = False
        for version in repository.select_initial_versions(state, settings.models_loaded):
            if repository.is_pinned(version):  # the operator has chosen this version
                continue
            previous_version = repository.find_fallback_version(
                settings.models, version, refusals.find_reason
            )
            if previous_version is None or refusals.is_accepted(version):
                continue
            try:
                _compare_pair(settings, shadow_tests, version, previous_version)
            except Interrupted as error:
                log.warning(
                    "%s could not be compared with version %s: %s",
                    version.path,
                    previous_version.version,
                    error,
                )
            except ModelError as error:
                if is_provider_error(error):
                    raise
                refusals.refuse(version, to_one_line(error), lasting=is_lasting(error))
                has_refused = True
        if not has_refused:
            return state
        state = find_serving_state(settings, refusals)


def _compare_pair(
    settings: Settings, shadow_tests: ShadowTests, version: ModelVersion, previous_version: ModelVersion
) -> None:
    """Raise `ModelError` when a version changes more than it may, beyond chance."""
    loads = _create_load(settings, version), _create_load(settings, previous_version)
    result = shadow_tests.run(*loads, [], golden=True)
    probability = _compute_binomial_tail(result.images, result.flips, settings.swap_flips)
    if result.flip_rate > settings.swap_flips and probability >= _SIGNIFICANCE_LEVEL:
        log.warning(
            f"{version.path} gives {result.flips} of {result.images} golden images another label than "
            f"version {previous_version.version}, more than FOVEA_SWAP_FLIPS allows. It is served, because "
            "so few images prove nothing"
        )
        result = replace(result, flips=0)
    elif not result.images and settings.swap_flips < 1:
        log.warning(
            f"{version.path} could not be compared with version {previous_version.version}: "
            "there are no images"
        )
    check_result(result, settings.swap_flips, settings.swap_slowdown)


def _compute_binomial_tail(images: int, flips: int, rate: float) -> float:
    """Return the probability of at least `flips` flips in `images` images that each flip at `rate`."""
    counts = range(flips, images + 1)
    return math.fsum(
        math.comb(images, count) * rate**count * (1 - rate) ** (images - count) for count in counts
    )


def _create_load(settings: Settings, version: ModelVersion) -> LoadCommand:
    """Return the load message for a trial."""
    provider = version.config.provider or settings.provider
    plan = ProcessPlan(
        provider=provider,
        batch_max=version.config.batch_max or settings.batch_max,
        threads=1,
        wide_threads=0,
        decode_threads=1,
        image_pixels=settings.image_pixels,
        decode_bytes=settings.decode_bytes,
        processes=1,
        engine_cache=find_engine_cache(settings, provider),
    )
    return LoadCommand(0, str(version.path), str(version.path), version.fingerprint, plan)
