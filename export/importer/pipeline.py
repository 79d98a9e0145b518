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
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from fovea.export import golden
from fovea.export.from_checkpoint import REPORT_FILE, embed_contract
from fovea.export.importer.foreign_model import Arithmetic, ImportRefused, ReferenceModel
from fovea.export.importer.inspect import (
    BATCHES,
    TOLERANCE,
    ForeignModel,
    ImportRequest,
    draw_noise,
    inspect_model,
)
from fovea.export.importer.label_file import Labels, read_labels
from fovea.export.importer.labelled_images import MIN_FAST_IMAGES
from fovea.export.importer.recipe_check import CheckReport, CheckResult, check_recipe
from fovea.export.importer.wrap import WrappedModel
from fovea.export.layer_table import build_layer_table, find_feature_maps
from fovea.export.verify import VerificationError
from fovea.model.data.pixels import get_thread_count
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    Contract,
    Geometry,
    GoldenSet,
    Task,
    Training,
)
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.artifact.repository import (
    DEFAULT_MODEL_FILE,
    MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    next_version,
    record_default_model,
)
from fovea.service.atomic_files import write_file
from fovea.service.inference.engine import Engine, GoldenDifferences

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
class ProbabilityAgreement:
    """The largest difference of a probability from the original file, at one batch size."""

    batch: int
    probabilities: float


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
    agreement: tuple[ProbabilityAgreement, ...]
    golden: GoldenDifferences
    check: CheckReport | None


def import_model(request: ImportRequest) -> ImportReport:
    """Write `out/name/<next version>/model.onnx` and its `report.json`.

    Raises `ImportRefused`, `VerificationError`, `DataError` or `ModelError`, and then leaves no file.
    """
    if not MODEL_NAME_PATTERN.fullmatch(request.name):
        raise ImportRefused(f"--name is {request.name!r}; {MODEL_NAME_RULE}")
    labels = read_labels(request.labels)
    foreign = inspect_model(request, labels)
    geometry = request.preprocessing.build_geometry(foreign.graph_input.height, foreign.graph_input.width)
    wrapped_model = _wrap_model(foreign)
    check_result = check_recipe(request.check, request, foreign, geometry, labels) if request.check else None
    if check_result:
        geometry = replace(geometry, pixel_path=check_result.pixel_path)
    out = request.out / request.name / _find_next_version(request.out / request.name)
    contract = _build_contract(request, foreign, wrapped_model, geometry, labels, out.name, check_result)
    content = embed_contract(wrapped_model.model, contract)
    engine = Engine(content, provider="cpu", threads=get_thread_count())
    agreement = _compare_with_file(foreign, engine)
    report = ImportReport(
        model=contract.name,
        version=contract.version,
        bytes=len(content),
        parameters=wrapped_model.parameters,
        file=_replace_invalid_bytes(request.file.name),
        sha256=_compute_sha256(request.file),
        facts=(*foreign.facts, *_collect_facts(request, foreign, labels, geometry, check_result)),
        agreement=agreement,
        golden=engine.check_golden_set(),
        check=check_result.report if check_result else None,
    )
    # All checks have passed: nothing is written before, so that a failed import leaves no file. The default
    # is recorded first: beside a second model, a model without this record is not the default.
    record_default_model(request.out)
    write_file(out / MODEL_FILE, content)
    write_file(out / REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n")
    if request.default:
        write_file(request.out / DEFAULT_MODEL_FILE, request.name + "\n")
    return report


def _wrap_model(foreign: ForeignModel) -> WrappedModel:
    """Return the wrapped model, with merged steps unless their last bits show in the answers."""
    wrapped_model = foreign.wrap(foreign.normalization)
    reference = ReferenceModel(wrapped_model.model, threads=get_thread_count())
    pixels = draw_noise(_MERGE_IMAGE_COUNT, foreign.graph_input)
    differences = reference(pixels)[wrapped_model.probabilities] - foreign.compute_probabilities(pixels)
    if np.abs(differences).max() <= TOLERANCE[foreign.arithmetic] / 2:
        return wrapped_model
    return foreign.wrap(foreign.normalization, merges=False)


def _find_next_version(folder: Path) -> str:
    """Return one more than the highest version in the folder."""
    try:
        return next_version(folder)
    except OSError as error:
        raise ImportRefused(f"cannot list {folder}: {error.strerror}") from None


def _compute_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- the contract --------------------------------------------------------------------------------


def _build_contract(
    request: ImportRequest,
    foreign: ForeignModel,
    wrapped_model: WrappedModel,
    geometry: Geometry,
    labels: Labels,
    version: str,
    check_result: CheckResult | None,
) -> Contract:
    layers = build_layer_table(wrapped_model.model)
    reference = ReferenceModel(wrapped_model.model, threads=get_thread_count())
    images = golden.draw_golden_images(
        geometry, lambda pixels: reference(pixels)[wrapped_model.logits].astype(np.float32)
    )
    task, count = foreign.task, len(labels.names)
    return Contract(
        format=FORMAT_VERSION,
        name=request.name,
        version=version,
        task=task,
        labels=labels.names,
        input_name=wrapped_model.pixels,
        input=geometry,
        logits_name=wrapped_model.logits,
        probabilities_name=wrapped_model.probabilities,
        feature_maps=find_feature_maps(layers),
        thresholds=(0.5,) * {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: count}[task],
        temperature=1.0,
        coverage=(),
        training=Training(
            f"imported: {_replace_invalid_bytes(request.file.name)}",
            0,
            f"sha256:{_compute_sha256(request.file)}",
            _replace_invalid_bytes(request.command),
        ),
        accuracy=check_result.accuracy if check_result else None,
        reference=check_result.reference if check_result else None,
        quantization=None,
        layers=layers,
        golden=GoldenSet(
            _compute_logit_tolerance(foreign, [one for image in images for one in image.logits]), images
        ),
    )


def _replace_invalid_bytes(name: str) -> str:
    """Return the name with bytes that are not UTF-8 replaced, because they cannot be written."""
    return name.encode(errors="replace").decode()


def _compute_logit_tolerance(foreign: ForeignModel, logits: list[float]) -> dict[str, float]:
    tolerance = dict(golden.LOGIT_TOLERANCE)
    if foreign.arithmetic is not Arithmetic.FLOAT32:
        tolerance = dict.fromkeys(tolerance, _COARSE_TOLERANCE)
    if foreign.arithmetic is Arithmetic.INT8:
        tolerance["openvino/float32"] = golden.OPENVINO_INT8_TOLERANCE
    factor = max(1.0, max(map(abs, logits)) / _USUAL_LOGIT)
    return {provider: one * factor for provider, one in tolerance.items()}


# --- verification --------------------------------------------------------------------------------


def _compare_with_file(foreign: ForeignModel, engine: Engine) -> tuple[ProbabilityAgreement, ...]:
    """Compare the engine with the original file in plain ONNX Runtime.

    Raises `VerificationError`.
    """
    pixels = draw_noise(4 * max(BATCHES), foreign.graph_input)
    expected, limit = foreign.compute_probabilities(pixels), TOLERANCE[foreign.arithmetic]
    agreements = []
    for batch in BATCHES:
        parts = [engine.run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
        worst = float(np.abs(np.concatenate(parts) - expected).max())
        if not worst <= limit:  # a NaN is a disagreement too
            raise VerificationError(
                f"at batch {batch} a probability of the imported graph is off by {worst:.3g}; "
                f"at most {limit:g}"
            )
        agreements.append(ProbabilityAgreement(batch, worst))
    return tuple(agreements)


# --- displayed facts -----------------------------------------------------------------------------


def _collect_facts(
    request: ImportRequest,
    foreign: ForeignModel,
    labels: Labels,
    geometry: Geometry,
    check_result: CheckResult | None,
) -> tuple[tuple[str, str], ...]:
    return (
        ("labels", _describe_labels(labels)),
        ("normalise", _describe_normalization(request, foreign)),
        ("geometry", _describe_geometry(request, geometry)),
        ("pixel path", _describe_pixel_path(geometry, check_result)),
    )


def _describe_labels(labels: Labels) -> str:
    text = f"{len(labels.names)}, from {labels.names[0]!r} to {labels.names[-1]!r}"
    if labels.shared_names:
        text += f"; {', '.join(map(repr, labels.shared_names))} occurred several times and are now numbered"
    return "; ".join([text, *labels.notes])


def _describe_normalization(request: ImportRequest, foreign: ForeignModel) -> str:
    if foreign.normalization is None:
        note = "; of the preset only the geometry is used" if request.preprocessing.preset else ""
        return f"uint8, RGB, unchanged: the graph normalises them itself{note}"
    return f"{foreign.normalization} ({request.preprocessing.arithmetic_origin})"


def _describe_geometry(request: ImportRequest, geometry: Geometry) -> str:
    return f"{format_steps(geometry.steps)} ({request.preprocessing.geometry_origin})"


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
