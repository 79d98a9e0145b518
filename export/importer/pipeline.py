"""The import of a foreign classifier to one verified, self-describing ONNX file.

Facts that the file does not contain must be given as options. The report lists the facts that were read,
given and assumed. The steps are:

    read        the file, its weights, its input               (foreign_model, graph_input)
    run         to determine the kind of its output            (graph_output)
    batch       made dynamic if it was fixed, and proven       (dynamic_batch)
    wrap        normalisation before it, softmax after it      (wrap)
    check       on labelled images, if there are any           (labelled_images, recipe_check)
    verify      against the original file, then write
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from fovea.export import golden
from fovea.export.from_checkpoint import REPORT_FILE, with_contract
from fovea.export.importer.foreign_model import Arithmetic, ImportRefused, Plain
from fovea.export.importer.inspect import BATCHES, TOLERANCE, Foreign, Request, look_at, noise
from fovea.export.importer.label_file import Labels, read_labels
from fovea.export.importer.labelled_images import FAST_IMAGES
from fovea.export.importer.recipe_check import Checked, Outcome, try_on
from fovea.export.importer.wrap import Wrapped
from fovea.export.layer_table import feature_maps, layer_table
from fovea.export.verify import VerificationError
from fovea.model.atomic_files import write_file
from fovea.model.data.pixels import get_thread_count
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    Contract,
    Geometry,
    GoldenSet,
    PixelPath,
    Resize,
    Task,
    Training,
)
from fovea.service.artifact.repository import (
    DEFAULT_MODEL_FILE,
    MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    next_version,
    record_default_model,
)
from fovea.service.inference.engine import Engine, GoldenDifferences

_COARSE_TOLERANCE: Final = 5e-2
"""Maximum absolute difference of a golden logit near 10, on any processor.

float16: between casts x86 computes in float32, ARM in float16, which has the 10 bits of mantissa that TF32
has on CUDA (`golden.LOGIT_TOLERANCE`). int8 has 8 bits, and a processor without VNNI may saturate where
another does not.
"""

_USUAL_LOGIT: Final = 10.0
"""Size of logits for which the tolerances are made; for larger logits the error grows in proportion."""


@dataclass(frozen=True)
class Agreed:
    """The largest difference of a probability from the original file, at one batch size."""

    batch: int
    probabilities: float


@dataclass(frozen=True)
class Report:
    """The facts and verification results of an import."""

    model: str
    version: str
    bytes: int
    parameters: int
    file: str
    sha256: str
    facts: tuple[tuple[str, str], ...]
    """Properties of the model with their origin, as displayed."""
    agreement: tuple[Agreed, ...]
    golden: GoldenDifferences
    check: Checked | None


def import_model(request: Request) -> Report:
    """Write `out/name/<next version>/model.onnx` and its `report.json`.

    Raises `ImportRefused`, `VerificationError`, `DataError` or `ModelError`, and then leaves no file.
    """
    if not MODEL_NAME_PATTERN.fullmatch(request.name):
        raise ImportRefused(f"--name is {request.name!r}; {MODEL_NAME_RULE}")
    labels = read_labels(request.labels)
    foreign = look_at(request, labels)
    geometry = request.wishes.geometry(foreign.taken.height, foreign.taken.width)
    wrapped = foreign.wrapped(foreign.normalization)
    outcome = try_on(request.check, request, foreign, geometry, labels) if request.check else None
    if outcome:
        geometry = replace(geometry, pixel_path=outcome.path)
    out = request.out / request.name / _next_version(request.out / request.name)
    contract = _contract(request, foreign, wrapped, geometry, labels, out.name, outcome)
    content = with_contract(wrapped.model, contract)
    engine = Engine(content, provider="cpu", threads=get_thread_count())
    agreement = _verify(foreign, engine)
    report = Report(
        model=contract.name,
        version=contract.version,
        bytes=len(content),
        parameters=sum(math.prod(tensor.dims) for tensor in wrapped.model.graph.initializer),
        file=_text(request.file.name),
        sha256=_digest(request.file),
        facts=(*foreign.facts, *_facts(request, foreign, labels, geometry, outcome)),
        agreement=agreement,
        golden=engine.check_golden_set(),
        check=outcome.checked if outcome else None,
    )
    record_default_model(request.out)
    write_file(out / MODEL_FILE, content)
    write_file(out / REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n")
    if request.default:
        write_file(request.out / DEFAULT_MODEL_FILE, request.name + "\n")
    return report


def _next_version(folder: Path) -> str:
    """Return one more than the highest version in the folder."""
    try:
        return next_version(folder)
    except OSError as error:
        raise ImportRefused(f"cannot list {folder}: {error.strerror}") from None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- the contract --------------------------------------------------------------------------------


def _contract(
    request: Request,
    foreign: Foreign,
    wrapped: Wrapped,
    geometry: Geometry,
    labels: Labels,
    version: str,
    outcome: Outcome | None,
) -> Contract:
    layers = layer_table(wrapped.model)
    plain = Plain(wrapped.model, threads=get_thread_count())
    images = golden.golden_images(geometry, lambda pixels: plain(pixels)[wrapped.logits].astype(np.float32))
    task, count = foreign.task, len(labels.names)
    return Contract(
        format=FORMAT_VERSION,
        name=request.name,
        version=version,
        task=task,
        labels=labels.names,
        input_name=wrapped.pixels,
        input=geometry,
        logits_name=wrapped.logits,
        probabilities_name=wrapped.probabilities,
        feature_maps=feature_maps(layers),
        thresholds=(0.5,) * {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: count}[task],
        temperature=1.0,
        coverage=(),
        training=Training(
            f"imported: {_text(request.file.name)}",
            0,
            f"sha256:{_digest(request.file)}",
            _text(request.command),
        ),
        accuracy=outcome.accuracy if outcome else None,
        reference=outcome.reference if outcome else None,
        layers=layers,
        golden=GoldenSet(
            _logit_tolerance(foreign, [one for image in images for one in image.logits]), images
        ),
    )


def _text(name: str) -> str:
    """Return the name with bytes that are not UTF-8 replaced, because they cannot be written."""
    return name.encode(errors="replace").decode()


def _logit_tolerance(foreign: Foreign, logits: list[float]) -> dict[str, float]:
    tolerance = dict(golden.LOGIT_TOLERANCE)
    if foreign.arithmetic is not Arithmetic.FLOAT32:
        tolerance = dict.fromkeys(tolerance, _COARSE_TOLERANCE)
    size = max(1.0, max(map(abs, logits)) / _USUAL_LOGIT)
    return {provider: one * size for provider, one in tolerance.items()}


# --- verification --------------------------------------------------------------------------------


def _verify(foreign: Foreign, engine: Engine) -> tuple[Agreed, ...]:
    """Compare the engine with the original file in plain ONNX Runtime.

    Raises `VerificationError`.
    """
    pixels = noise(4 * max(BATCHES), foreign.taken)
    wanted, limit = foreign.by_hand(pixels), TOLERANCE[foreign.arithmetic]
    agreed = []
    for batch in BATCHES:
        parts = [engine.run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
        worst = float(np.abs(np.concatenate(parts) - wanted).max())
        if not worst <= limit:  # a NaN is a disagreement too
            raise VerificationError(
                f"at batch {batch} a probability of the imported graph is off by {worst:.3g}; "
                f"at most {limit:g}"
            )
        agreed.append(Agreed(batch, worst))
    return tuple(agreed)


# --- displayed facts -----------------------------------------------------------------------------


def _facts(
    request: Request, foreign: Foreign, labels: Labels, geometry: Geometry, outcome: Outcome | None
) -> tuple[tuple[str, str], ...]:
    return (
        ("labels", _labels_said(labels)),
        ("normalise", _normalization_said(request, foreign)),
        ("resize", _geometry_said(request, geometry)),
        ("pixel path", _path_said(geometry.pixel_path, outcome)),
    )


def _labels_said(labels: Labels) -> str:
    said = f"{len(labels.names)}, from {labels.names[0]!r} to {labels.names[-1]!r}"
    if labels.renamed:
        said += f"; {', '.join(map(repr, labels.renamed))} stood for several, now with their numbers"
    return "; ".join([said, *labels.notes])


def _normalization_said(request: Request, foreign: Foreign) -> str:
    if foreign.normalization is None:
        alone = "; of the preset only the geometry is used" if request.wishes.preset else ""
        return f"uint8, RGB, as they are: the graph normalises them itself{alone}"
    return f"{foreign.normalization} ({request.wishes.arithmetic_said})"


def _geometry_said(request: Request, geometry: Geometry) -> str:
    how = f"{geometry.interpolation} ({request.wishes.geometry_said})"
    if geometry.resize is Resize.STRETCH:
        return f"stretched to {geometry.height} x {geometry.width}, {how}"
    return (
        f"shorter side to {geometry.resize_to}, of it the middle {geometry.height} x {geometry.width}, {how}"
    )


def _path_said(path: PixelPath, outcome: Outcome | None) -> str:
    if outcome is None:
        return f"{path} (only --check can show whether fast loses nothing)"
    checked = outcome.checked
    said = (
        f"{path} (fast changes {checked.fast_changed} of {checked.images} answers, and probabilities by "
        f"{checked.fast_difference:.2g} at most; {checked.fast_scaled} images are large enough to be decoded "
        "smaller"
    )
    return said + (
        ")" if checked.fast_scaled >= FAST_IMAGES else f", of the {FAST_IMAGES} that would show it)"
    )
