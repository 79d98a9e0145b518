"""The import of a foreign classifier to one verified, self-describing ONNX file.

Facts that the file does not contain must be given as options. The report lists the facts that were read,
given and assumed. The steps are:

    read        the file, its weights, its input               (foreign_model, graph_input)
    run         to determine the kind of its output            (graph_output)
    batch       made dynamic if it was fixed, and verified     (dynamic_batch)
    wrap        normalisation before it, softmax after it      (wrap)
    check       on labelled images, if there are any           (labelled_images, recipe_check)
    verify      against the original file, then write
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from onnx import ModelProto

from fovea.export import golden
from fovea.export.importer.agreement import Agreement, compare_with_file, run_file
from fovea.export.importer.check_result import MIN_FAST_IMAGES, CheckReport, CheckResult
from fovea.export.importer.foreign_model import Arithmetic, ImportRefused
from fovea.export.importer.import_files import write_import
from fovea.export.importer.inspect import (
    TOLERANCE,
    ForeignModel,
    ImportRequest,
    draw_noise,
    inspect_model,
)
from fovea.export.importer.label_file import Labels
from fovea.export.importer.measured_shapes import measure_shapes
from fovea.export.importer.sources.comparison import Comparison, compare_with_pipeline
from fovea.export.importer.sources.origins import (
    describe_data,
    describe_source,
    name_origins,
    run_source,
)
from fovea.export.importer.wrap import WrappedModel
from fovea.export.layer_table import build_layer_table, find_feature_maps
from fovea.export.model_output import embed_contract
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    Contract,
    Geometry,
    GoldenSet,
    PixelPath,
    Task,
    Training,
)
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.artifact.repository import (
    DEFAULT_MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    next_version,
)
from fovea.service.atomic_files import write_file
from fovea.service.errors import ContractError, to_one_line
from fovea.service.inference.engine import Engine, GoldenDifferences
from fovea.service.resources.threads import get_thread_count

_COARSE_TOLERANCE: Final = 5e-2
"""Maximum absolute difference of a golden logit near 10, on any processor.

float16: between casts x86 computes in float32, ARM in float16, which has the 10 bits of mantissa that TF32
has on CUDA (`golden.LOGIT_TOLERANCE`). int8 has 8 bits, and a processor without VNNI may saturate where
another does not.
"""

_USUAL_LOGIT: Final = 10.0
"""Size of logits for which the tolerances are made; for larger logits the error grows in proportion."""


_MERGE_IMAGE_COUNT: Final = 6
"""Number of images on which merged steps before the graph are tried."""


@dataclass(frozen=True)
class ImportReport:
    """The facts and verification results of an import."""

    model: str
    version: str
    bytes: int
    parameters: int
    file: str
    sha256: str
    facts: tuple[tuple[str, str], ...]
    """Properties of the model with their origin, as displayed."""
    agreement: tuple[Agreement, ...]
    tolerance: float
    """Maximum difference of a probability from the original file, unless the logits agree."""
    golden: GoldenDifferences
    check: CheckReport | None
    comparison: Comparison | None = None
    """Comparison with the source's own pipeline; None if there is none here."""


def import_model(request: ImportRequest) -> ImportReport:
    """Write `out/name/<next version>/model.onnx` and its `report.json`.

    Raises `ImportRefused`, `VerificationError`, `DataError` or `ModelError`, and then leaves no file.
    """
    if not MODEL_NAME_PATTERN.fullmatch(request.name):
        raise ImportRefused(f"--name is {request.name!r}; {MODEL_NAME_RULE}")
    foreign = inspect_model(request)
    geometry = _build_geometry(request, foreign)
    wrapped_model = _wrap_model(foreign)
    check_result = _check_recipe(request, foreign, geometry)
    if check_result:
        geometry = replace(geometry, pixel_path=check_result.pixel_path)
    version = _find_next_version(request.out / request.name)
    contract = _build_contract(request, foreign, wrapped_model, geometry, version, check_result)
    model = ModelProto.FromString(embed_contract(wrapped_model.model, contract))

    # Both functions are called in this thread, before `write_import` returns.
    def write_model(file: BinaryIO) -> None:
        foreign.reference.weights.write(model, file)

    def verify(file: Path) -> ImportReport:
        return _verify(file, request, foreign, wrapped_model, geometry, contract, check_result)

    report = write_import(request, contract, write_model, verify)
    if request.default:
        write_file(request.out / DEFAULT_MODEL_FILE, request.name + "\n")
    return report


def _verify(
    file: Path,
    request: ImportRequest,
    foreign: ForeignModel,
    wrapped_model: WrappedModel,
    geometry: Geometry,
    contract: Contract,
    check_result: CheckResult | None,
) -> ImportReport:
    """Compare the written file with the original file and the source's pipeline. Return the report.

    The weights are in memory once at a time: in the reference model, in the source's library, in the engine.
    Raises `VerificationError`.
    """
    answers = run_file(foreign)
    source_run, comparison_note = run_source(request, foreign, geometry)
    foreign.reference.close()
    engine = Engine(file, provider="cpu", threads=get_thread_count())
    agreement = compare_with_file(answers, engine, request.tolerance)
    comparison = compare_with_pipeline(source_run, foreign, engine) if source_run else None
    if comparison:
        comparison_note = f"with {comparison}"
    return ImportReport(
        model=contract.name,
        version=contract.version,
        bytes=file.stat().st_size,
        parameters=wrapped_model.parameters,
        file=_replace_invalid_bytes(request.provenance.file if request.provenance else request.file.name),
        sha256=_compute_sha256(_find_original(request)),
        facts=(
            *name_origins(foreign.facts, request.provenance),
            *_collect_facts(request, foreign, foreign.labels, geometry, check_result),
            *((("compared", comparison_note),) if comparison_note else ()),
        ),
        agreement=agreement,
        tolerance=request.tolerance or TOLERANCE[foreign.arithmetic],
        golden=engine.check_golden_set(),
        check=check_result.report if check_result else None,
        comparison=comparison,
    )


def _check_recipe(request: ImportRequest, foreign: ForeignModel, geometry: Geometry) -> CheckResult | None:
    if request.check is None:
        return None
    from fovea.export.importer.recipe_check import check_recipe  # it needs torch

    return check_recipe(request.check, request, foreign, geometry, foreign.labels)


def _wrap_model(foreign: ForeignModel) -> WrappedModel:
    """Return the wrapped model, with merged steps unless their last bits show in the answers."""
    wrapped_model = foreign.wrap(foreign.normalization)
    reference = foreign.open_wrapped(wrapped_model)
    pixels = draw_noise(_MERGE_IMAGE_COUNT, foreign.graph_input)
    differences = reference(pixels)[wrapped_model.probabilities] - foreign.compute_probabilities(pixels)
    if np.abs(differences).max() <= TOLERANCE[foreign.arithmetic] / 2:
        return wrapped_model
    return foreign.wrap(foreign.normalization, merges=False)


def _build_geometry(request: ImportRequest, foreign: ForeignModel) -> Geometry:
    """Return the geometry of the source, or of the options."""
    height, width = foreign.graph_input.height, foreign.graph_input.width
    if request.provenance is None or request.provenance.steps is None:
        return request.preprocessing.build_geometry(height, width)
    try:
        return Geometry(height, width, request.provenance.steps, PixelPath.EXACT)
    except ContractError as error:
        raise ImportRefused(
            f"{request.provenance.geometry} does not fit the graph: {to_one_line(error)}; give --preset, or "
            "--resize, --crop and --interpolation"
        ) from None


def _find_next_version(folder: Path) -> str:
    """Return one more than the highest version in the folder."""
    try:
        return next_version(folder)
    except OSError as error:
        raise ImportRefused(f"cannot list {folder}: {error.strerror}") from None


def _find_original(request: ImportRequest) -> Path:
    """Return the file that the report names: that of the request, or that which was converted to it."""
    original = request.provenance.original if request.provenance else None
    return original or request.file


def _compute_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- the contract --------------------------------------------------------------------------------


def _build_contract(
    request: ImportRequest,
    foreign: ForeignModel,
    wrapped_model: WrappedModel,
    geometry: Geometry,
    version: str,
    check_result: CheckResult | None,
) -> Contract:
    layers = build_layer_table(wrapped_model.model, measure_shapes(foreign, wrapped_model))
    reference = foreign.open_wrapped(wrapped_model)
    images = golden.draw_golden_images(
        geometry, lambda pixels: reference(pixels)[wrapped_model.logits].astype(np.float32)
    )
    task, labels, count = foreign.task, foreign.labels.names, len(foreign.labels.names)
    return Contract(
        format=FORMAT_VERSION,
        name=request.name,
        version=version,
        task=task,
        labels=labels,
        input_name=wrapped_model.pixels,
        input=geometry,
        logits_name=wrapped_model.logits,
        probabilities_name=wrapped_model.probabilities,
        feature_maps=find_feature_maps(layers),
        thresholds=(0.5,) * {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: count}[task],
        temperature=1.0,
        coverage=(),
        training=Training(
            f"imported: {_replace_invalid_bytes(describe_data(request))}",
            0,
            f"sha256:{_compute_sha256(_find_original(request))}",
            _replace_invalid_bytes(request.command),
        ),
        accuracy=check_result.accuracy if check_result else None,
        reference=check_result.reference if check_result else None,
        known=check_result.known if check_result else None,
        quantization=None,
        layers=layers,
        golden=GoldenSet(
            _compute_logit_tolerance(request, foreign, [one for image in images for one in image.logits]),
            images,
        ),
    )


def _replace_invalid_bytes(name: str) -> str:
    """Return the name with bytes that are not UTF-8 replaced, because they cannot be written."""
    return name.encode(errors="replace").decode()


def _compute_logit_tolerance(
    request: ImportRequest, foreign: ForeignModel, logits: list[float]
) -> dict[str, float]:
    tolerance = dict(golden.LOGIT_TOLERANCE)
    if foreign.arithmetic is not Arithmetic.FLOAT32:
        tolerance = dict.fromkeys(tolerance, _COARSE_TOLERANCE)
    if foreign.arithmetic is Arithmetic.INT8:
        tolerance["openvino/float32"] = golden.OPENVINO_INT8_TOLERANCE
    factor = max(1.0, max(map(abs, logits)) / _USUAL_LOGIT)
    # Near 0.5, a logit changes by four times as much as its probability.
    least = 4 * (request.tolerance or 0.0)
    return {provider: max(one * factor, least) for provider, one in tolerance.items()}


# --- displayed facts -----------------------------------------------------------------------------


def _collect_facts(
    request: ImportRequest,
    foreign: ForeignModel,
    labels: Labels,
    geometry: Geometry,
    check_result: CheckResult | None,
) -> tuple[tuple[str, str], ...]:
    return (
        *describe_source(request.provenance),
        ("labels", _describe_labels(request, labels)),
        ("normalise", _describe_normalization(request, foreign)),
        ("geometry", _describe_geometry(request, geometry)),
        *((("tolerance", f"{request.tolerance:g} (from --tolerance)"),) if request.tolerance else ()),
        ("pixel path", _describe_pixel_path(geometry, check_result)),
        *(
            ()
            if check_result
            else (("check", "not checked on images; --check FOLDER tries this and other recipes on yours"),)
        ),
    )


def _describe_labels(request: ImportRequest, labels: Labels) -> str:
    text = f"{len(labels.names)}, from {labels.names[0]!r} to {labels.names[-1]!r}"
    if request.provenance and request.provenance.labels:
        text += f" ({request.provenance.labels})"
    if labels.shared_names:
        text += f"; {', '.join(map(repr, labels.shared_names))} occurred several times and are now numbered"
    if request.labels is None:
        text += "; the graph's own"
    return "; ".join([text, *labels.notes])


def _describe_normalization(request: ImportRequest, foreign: ForeignModel) -> str:
    if foreign.normalization is None:
        note = "; of the preset only the geometry is used" if request.preprocessing.preset else ""
        colours = "grey (ITU-R 601)" if foreign.graph_input.channels == 1 else "RGB"
        return f"uint8, {colours}, unchanged: the graph normalises them itself{note}"
    text = foreign.normalization.describe(foreign.graph_input.channels)
    return f"{text} ({request.normalization_origin})"


def _describe_geometry(request: ImportRequest, geometry: Geometry) -> str:
    stated_origin = request.provenance.geometry if request.provenance else None
    return f"{format_steps(geometry.steps)} ({stated_origin or request.preprocessing.geometry_origin})"


def _describe_pixel_path(geometry: Geometry, check_result: CheckResult | None) -> str:
    path = geometry.pixel_path
    if geometry.fast_obstacle:
        return f"{path} (fast is the same here: {geometry.fast_obstacle})"
    if check_result is None:
        return f"{path} (only --check can show whether fast loses nothing)"
    report = check_result.report
    text = (
        f"{path} (fast changes {report.fast_changed} of {report.images} answers, and probabilities by "
        f"at most {report.fast_difference:.2g}; {report.fast_scaled} images are large enough to be decoded "
        "smaller"
    )
    return text + (
        ")" if report.fast_scaled >= MIN_FAST_IMAGES else f"; at least {MIN_FAST_IMAGES} are needed)"
    )
